"""HunYuan MoE V1: softmax, weights that sum to 1, one shared expert as wide as the routed ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig

from moesaic.hf.conversion.base import FamilyConversion, activation_field, top_k_router
from moesaic.hf.router_presets import rules
from moesaic.layer import MoESpec


class HunyuanConversion(FamilyConversion):
    """`hunyuan_v1_moe`, with the same numbers of experts and picks in all layers."""

    names: ClassVar[Mapping[str, str]] = {"shared_experts": "shared_mlp"}

    def values(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "experts": {
                "num_experts": config.num_experts,
                "intermediate_size": config.intermediate_size,
                "activation": config.hidden_act,
            },
            "router": rules.hunyuan_v1_moe(config),
            "shared_experts": {"num_experts": 1},
        }

    def restrict(self, config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
        return {
            "num_experts": spec.experts.num_experts,
            "moe_topk": top_k_router(spec).top_k,
            "intermediate_size": spec.experts.intermediate_size,
            **activation_field(config, spec),
        }

    def to_block(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        block = super().to_block(tensors)
        block["gate.weight"] = block.pop("gate.wg.weight")
        return block

    def to_stock(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stock = super().to_stock(tensors)
        stock["gate.wg.weight"] = stock.pop("gate.weight")
        return stock
