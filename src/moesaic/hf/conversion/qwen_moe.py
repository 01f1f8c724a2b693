"""OLMoE, Qwen MoE and their relatives: softmax over all experts, top-k, renormalisation as `norm_topk_prob` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from moesaic.hf.conversion.base import (
    FamilyConversion,
    activation_field,
    mlp_layer_types,
    read_balance,
    sparse_layers,
    top_k_router,
)
from moesaic.hf.router_presets import rules, unsupported
from moesaic.layer import MoESpec


class OlmoeConversion(FamilyConversion):
    """`olmoe` (arXiv 2409.02060) and `flex_olmo`: every layer is an MoE layer."""

    def values(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "experts": {
                "num_experts": config.num_experts,
                "intermediate_size": config.intermediate_size,
                "activation": config.hidden_act,
            },
            "router": rules.softmax(config),
            "balance": read_balance(config, {}),
        }

    def restrict(self, config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
        return {
            "num_experts": spec.experts.num_experts,
            "num_experts_per_tok": top_k_router(spec).top_k,
            "intermediate_size": spec.experts.intermediate_size,
            "norm_topk_prob": _sums_to_one(spec),
            **activation_field(config, spec),
        }


class Qwen3MoeConversion(FamilyConversion):
    """`qwen3_moe`: some layers may be dense."""

    def values(self, config: PreTrainedConfig) -> dict[str, Any]:
        layers = self.placement(config)
        return {
            "experts": {
                "num_experts": config.num_experts,
                "intermediate_size": config.moe_intermediate_size,
                "activation": config.hidden_act,
            },
            "router": rules.softmax(config),
            "layers": layers,
            "balance": read_balance(config, layers),
        }

    def restrict(self, config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
        return {
            "num_experts": spec.experts.num_experts,
            "num_experts_per_tok": top_k_router(spec).top_k,
            "moe_intermediate_size": spec.experts.intermediate_size,
            "norm_topk_prob": _sums_to_one(spec),
            **self.placement_fields(config, spec),
            **activation_field(config, spec),
        }

    def placement(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Which layers are MoE, as the `layers` section of a spec."""
        return _placement(config)

    def placement_fields(self, config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
        """The config fields from which `placement` reads that of `spec`."""
        moe_layers = spec.layers.indices(config.num_hidden_layers)
        dense = [index for index in range(config.num_hidden_layers) if index not in moe_layers]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


class MellumConversion(Qwen3MoeConversion):
    """`mellum`: the same with a list of dense and sparse layers."""

    def placement(self, config: PreTrainedConfig) -> dict[str, Any]:
        return sparse_layers(config)

    def placement_fields(self, config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
        return mlp_layer_types(config, spec)


class Qwen2MoeConversion(Qwen3MoeConversion):
    """`qwen2_moe`: adds one shared expert, scaled by a sigmoid."""

    names: ClassVar[Mapping[str, str]] = {"shared_experts": "shared_expert"}

    def values(self, config: PreTrainedConfig) -> dict[str, Any]:
        width = config.shared_expert_intermediate_size
        if not width:
            raise unsupported(
                config, "shared_expert_intermediate_size", "is no width", "the family has a shared expert"
            )
        return super().values(config) | {"shared_experts": {"intermediate_size": width, "sigmoid_gate": True}}

    def restrict(self, config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
        shared = {"shared_expert_intermediate_size": spec.shared_width} if spec.shared_width else {}
        return super().restrict(config, spec) | shared


def _placement(config: PreTrainedConfig) -> dict[str, Any]:
    """A layer is MoE unless it is listed or not the last of `decoder_sparse_step` layers."""
    step, listed = config.decoder_sparse_step, config.mlp_only_layers
    if not listed:
        return {"every": step}
    only = [index for index in range(config.num_hidden_layers) if index not in listed and (index + 1) % step == 0]
    if not only:
        raise unsupported(config, "mlp_only_layers", "leaves no MoE layer", "use moesaic.upcycle for dense models")
    return {"only": only}


def _sums_to_one(spec: MoESpec) -> bool:
    return top_k_router(spec).normalize_top_k or top_k_router(spec).softmax_over == "selected"
