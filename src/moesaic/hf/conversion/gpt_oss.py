"""gpt-oss: biases everywhere, a clamped gate, softmax over the selected logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from moesaic.hf.conversion.base import FamilyConversion, read_balance, top_k_router
from moesaic.hf.router_presets import rules
from moesaic.layer import MoESpec

TRANSPOSED = ("experts.gate_up_proj", "experts.down_proj")
INTERLEAVED = ("experts.gate_up_proj", "experts.gate_up_proj_bias")


class GptOssConversion(FamilyConversion):
    """`gpt_oss`: stored (N, in, out) with gate and up columns alternating; here (N, out, in), gate rows first."""

    names: ClassVar[Mapping[str, str]] = {"gate": "router"}

    def values(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "experts": {
                "num_experts": config.num_local_experts,
                "intermediate_size": config.intermediate_size,
                "activation": "clamped_swiglu",
                "bias": True,
                "swiglu_alpha": config.swiglu_alpha,
                "swiglu_limit": config.swiglu_limit,
            },
            "router": rules.selected_softmax(config, linear_bias=True),
            "balance": read_balance(config, {}),
        }

    def restrict(self, config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "num_local_experts": spec.experts.num_experts,
            "num_experts_per_tok": top_k_router(spec).top_k,
            "intermediate_size": spec.experts.intermediate_size,
        }
        if spec.experts.activation == "clamped_swiglu":
            fields |= {"swiglu_alpha": spec.experts.swiglu_alpha, "swiglu_limit": spec.experts.swiglu_limit}
        return fields

    def to_block(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        block = super().to_block(tensors)
        for name in TRANSPOSED:
            block[name] = block[name].transpose(1, 2)
        for name in INTERLEAVED:
            block[name] = torch.cat([block[name][:, 0::2], block[name][:, 1::2]], dim=1)
        return {name: tensor.contiguous() for name, tensor in block.items()}

    def to_stock(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stock = super().to_stock(tensors)
        for name in INTERLEAVED:
            stock[name] = torch.stack(stock[name].chunk(2, dim=1), dim=2).flatten(1, 2)
        for name in TRANSPOSED:
            stock[name] = stock[name].transpose(1, 2)
        return {name: tensor.contiguous() for name, tensor in stock.items()}
