"""Mixtral: softmax over all experts, top-k, weights that sum to 1; every layer is an MoE layer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from moesaic.hf.conversion.base import FamilyConversion, activation_field, read_balance, top_k_router
from moesaic.hf.router_presets import rules
from moesaic.layer import MoESpec


class MixtralConversion(FamilyConversion):
    """`mixtral` (arXiv 2401.04088, section 2.1)."""

    def values(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "experts": {
                "num_experts": config.num_local_experts,
                "intermediate_size": config.intermediate_size,
                "activation": config.hidden_act,
            },
            "router": rules.softmax_before_jitter(config),
            "balance": read_balance(config, {}),
        }

    def restrict(self, config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
        return {
            "num_local_experts": spec.experts.num_experts,
            "num_experts_per_tok": top_k_router(spec).top_k,
            "intermediate_size": spec.experts.intermediate_size,
            "router_jitter_noise": 0.0,
            **activation_field(config, spec),
        }
