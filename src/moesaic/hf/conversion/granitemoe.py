"""Granite MoE: top-k over logits, then softmax over the selected ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from moesaic.hf.conversion.base import FamilyConversion, activation_field, read_balance, top_k_router
from moesaic.hf.router_presets import rules
from moesaic.layer import MoESpec


class GraniteMoeConversion(FamilyConversion):
    """`granitemoe`; its multipliers belong to the decoder and stay there."""

    names: ClassVar[Mapping[str, str]] = {"gate": "router"}

    def values(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "experts": {
                "num_experts": config.num_local_experts,
                "intermediate_size": config.intermediate_size,
                "activation": config.hidden_act,
            },
            "router": rules.selected_softmax(config),
            "balance": read_balance(config, {}),
        }

    def restrict(self, config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
        return {
            "num_local_experts": spec.experts.num_experts,
            "num_experts_per_tok": top_k_router(spec).top_k,
            "intermediate_size": spec.experts.intermediate_size,
            **activation_field(config, spec),
        }
