"""transformers' implementations of experts, on the experts module of a stock family with the same parameters."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moesaic.bench.cases import Cell
from moesaic.bench.contenders.base import Entry, LayerContender, LayerEntry, Unavailable
from moesaic.bench.inputs import Call, LayerInputs

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "sonicmoe", "deepgemm")
_CUDA_ONLY = ("sonicmoe", "deepgemm")
# `batched_mm` copies the weights of every row; it is meant for decoding, and elsewhere takes minutes or all memory.
_MOST_COPIED_BYTES = 1 << 30


class StockContender(LayerContender):
    """One `experts_implementation` of transformers.

    Args:
        implementation: its name there.
    """

    family = "transformers"

    def __init__(self, implementation: str) -> None:
        self.implementation, self.name = implementation, f"transformers:{implementation}"

    def enter(self, cell: Cell, inputs: LayerInputs) -> Entry:
        reason = refusal(self.implementation, cell)
        if reason is not None:
            raise Unavailable(reason)
        modules = {id(call): stock_experts(cell, call, self.implementation) for call in inputs.calls}

        def forward(call: Call) -> Tensor:
            return modules[id(call)](call.x_TD, call.index_TK, call.weight_TK)

        return LayerEntry(cell, inputs.calls, forward)


def refusal(implementation: str, cell: Cell) -> str | None:
    """Why an implementation can't run in a cell, as far as that is known beforehand."""
    if implementation in _CUDA_ONLY and torch.device(cell.device).type != "cuda":
        return "needs a CUDA device"
    if implementation == "batched_mm":
        rows = cell.tokens * cell.shape.picks
        copied = rows * cell.shape.expert_parameters * cell.torch_dtype.itemsize
        if copied > _MOST_COPIED_BYTES:
            return f"copies the weights of each row, {copied / 1e9:.0f} GB here; it is meant for decoding"
    return None


def stock_experts(cell: Cell, call: Call, implementation: str) -> Qwen3MoeExperts:
    """The experts of a Qwen3-MoE, with the parameters of `call` themselves."""
    shape = cell.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.picks,
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = call.weights.up_NHD, call.weights.down_NDF  # type: ignore[assignment]
    return module


def stock_contenders() -> list[LayerContender]:
    """One for each implementation."""
    return [StockContender(name) for name in IMPLEMENTATIONS]
