"""DeepSeek V2 and V3, and GLM-4 MoE: grouped selection, scaled weights, shared experts, dense layers at the bottom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from moesaic.hf.conversion.base import FamilyConversion, activation_field, top_k_router, unsupported
from moesaic.layer import MoESpec

SELECTION_BIAS = "gate.e_score_correction_bias"


class DeepseekV2Conversion(FamilyConversion):
    """`deepseek_v2` (arXiv 2405.04434, section 2.2): softmax; a group's score is its best expert's.

    The stock router never renormalises, whatever `norm_topk_prob` says. It sets masked scores to 0 and takes the masked
    score as weight, so a masked expert adds nothing even when it is picked among scores that underflowed to 0. Masking
    with -inf gives the same output in that case too; masking with 0 would not, as our weights are the unmasked scores.
    """

    def values(self, config: PreTrainedConfig) -> dict[str, Any]:
        if config.mlp_bias:
            raise unsupported(
                config,
                "mlp_bias",
                "gives shared experts biases that routed experts lack, which a spec can't say",
                "convert a model without these biases",
            )
        router = {"top_k": config.num_experts_per_tok, "scaling_factor": config.routed_scaling_factor}
        match config.topk_method:
            case "greedy":
                pass
            case "group_limited_greedy":
                router |= _groups(config, "max")
            case _:
                raise unsupported(config, "topk_method", "is not known", "use greedy or group_limited_greedy")
        return {**_block(config), "router": router}

    def restrict(self, config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
        if top_k_router(spec).num_groups is None:
            return _restrict(config, spec) | {"topk_method": "greedy"}
        groups = {"n_group": top_k_router(spec).num_groups, "topk_group": top_k_router(spec).top_k_groups}
        return _restrict(config, spec) | groups | {"topk_method": "group_limited_greedy"}


class DeepseekV3Conversion(FamilyConversion):
    """`deepseek_v3` and `glm4_moe` (arXiv 2412.19437, section 2.1.2): sigmoid, selection bias, groups by top-2 sum."""

    def values(self, config: PreTrainedConfig) -> dict[str, Any]:
        router = {
            "top_k": config.num_experts_per_tok,
            "score_function": "sigmoid",
            "normalize_top_k": bool(config.norm_topk_prob),
            "normalization_epsilon": 1e-20 if config.norm_topk_prob else 0.0,
            "scaling_factor": config.routed_scaling_factor,
            "selection_bias": True,
        }
        return {**_block(config), "router": router | _groups(config, "top2_sum")}

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


def _groups(config: PreTrainedConfig, group_score: str) -> dict[str, Any]:
    for field in ("n_group", "topk_group"):
        if not getattr(config, field):
            raise unsupported(
                config, field, "is not a number of groups", "set n_group and topk_group to 1 for no groups"
            )
    if config.n_group == 1:
        return {}
    return {"num_groups": config.n_group, "top_k_groups": config.topk_group, "group_score": group_score}


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
