"""Our kernels: each that takes the input, the one that "auto" chooses called by that name."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moesaic.bench.cases import Cell
from moesaic.bench.contenders.base import Entry, LayerContender, LayerEntry, Unavailable
from moesaic.bench.inputs import Call, LayerInputs
from moesaic.errors import UnsupportedKernel
from moesaic.layer.kernels import KERNELS, Case, run_experts, select


class KernelContender(LayerContender):
    """A kernel of the registry.

    Args:
        kernel: its name.
    """

    family = "moesaic"

    def __init__(self, kernel: str) -> None:
        self.kernel, self.name = kernel, f"moesaic:{kernel}"

    def enter(self, cell: Cell, inputs: LayerInputs) -> Entry:
        call = inputs.calls[0]
        if self.kernel == "triton" and torch.device(cell.device).type == "cpu":
            raise Unavailable("needs a CUDA device")  # where it runs on a CPU, it is Triton's interpreter
        with torch.set_grad_enabled(cell.kind.backward):
            case = Case.of(call.weights, call.x_TD, call.index_TK, call.weight_TK)
        try:
            select(self.kernel, case, KERNELS)
        except UnsupportedKernel as error:
            raise Unavailable(str(error)) from None
        chosen = select("auto", case, KERNELS).name == self.kernel
        forward = partial(_forward, "auto" if chosen else self.kernel)
        entry = LayerEntry(cell, inputs.calls, forward, note="chosen by auto" if chosen else "")
        entry.default = chosen
        return entry


def _forward(kernel: str, call: Call) -> Tensor:
    return run_experts(kernel, call.weights, call.x_TD, call.index_TK, call.weight_TK)


def kernel_contenders() -> list[LayerContender]:
    """One for each kernel."""
    return [KernelContender(kernel.name) for kernel in KERNELS]
