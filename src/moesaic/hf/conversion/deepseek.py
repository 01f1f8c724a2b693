"""DeepSeek V2 and V3, and GLM-4 MoE: grouped selection, scaled weights, shared experts, dense layers at the bottom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from moesaic.hf.conversion.base import FamilyConversion, activation_field, top_k_router
from moesaic.hf.router_presets import rules, unsupported
from moesaic.layer import MoESpec

SELECTION_BIAS = "gate.e_score_correction_bias"


class DeepseekV2Conversion(FamilyConversion):
    """`deepseek_v2` (arXiv 2405.04434, section 2.2): softmax; a group's score is its best expert's."""

    def values(self, config: PreTrainedConfig) -> dict[str, Any]:
        if config.mlp_bias:
            raise unsupported(
                config,
                "mlp_bias",
                "gives shared experts biases that routed experts lack, which a spec can't say",
                "convert a model without these biases",
            )
        return {**_block(config), "router": rules.deepseek_v2(config)}

    def restrict(self, config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
        if top_k_router(spec).num_groups is None:
            return _restrict(config, spec) | {"topk_method": "greedy"}
        groups = {"n_group": top_k_router(spec).num_groups, "topk_group": top_k_router(spec).top_k_groups}
        return _restrict(config, spec) | groups | {"topk_method": "group_limited_greedy"}


class DeepseekV3Conversion(FamilyConversion):
    """`deepseek_v3` and `glm4_moe` (arXiv 2412.19437, section 2.1.2): sigmoid, selection bias, groups by top-2 sum."""

    def values(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {**_block(config), "router": rules.deepseek_v3(config)}

    def restrict(self, config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
        return _restrict(config, spec) | {
            "norm_topk_prob": top_k_router(spec).normalize_top_k,
            "n_group": top_k_router(spec).num_groups or 1,
            "topk_group": top_k_router(spec).top_k_groups or 1,
        }

    def to_block(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        block = super().to_block(tensors)
        if SELECTION_BIAS in block:
            # A stock model cast as a whole holds it in lower precision; ours keeps float32.
            block[SELECTION_BIAS] = block[SELECTION_BIAS].float()
        return block


def _block(config: PreTrainedConfig) -> dict[str, Any]:
    """What these families share."""
    if not config.n_shared_experts:
        raise unsupported(config, "n_shared_experts", "is not a number of shared experts", "set it to 1 or more")
    if config.first_k_dense_replace >= config.num_hidden_layers:
        raise unsupported(
            config, "first_k_dense_replace", "leaves no MoE layer", "use moesaic.upcycle for dense models"
        )
    return {
        "experts": {
            "num_experts": config.n_routed_experts,
            "intermediate_size": config.moe_intermediate_size,
            "activation": config.hidden_act,
        },
        "shared_experts": {"num_experts": config.n_shared_experts},
        "layers": {"first_dense": config.first_k_dense_replace},
    }


def _restrict(config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
    return {
        "n_routed_experts": spec.experts.num_experts,
        "num_experts_per_tok": top_k_router(spec).top_k,
        "moe_intermediate_size": spec.experts.intermediate_size,
        "n_shared_experts": max(1, spec.shared_width // spec.experts.intermediate_size),
        "first_k_dense_replace": min(spec.layers.indices(config.num_hidden_layers)),
        "routed_scaling_factor": top_k_router(spec).scaling_factor,
        **activation_field(config, spec),
    }
