"""DeepSeek V2 and V3 and their relatives: grouped selection, scaled weights, shared experts, dense layers at the bottom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig

from moesaic.hf.conversion.base import FamilyConversion, activation_field, mlp_layer_types, sparse_layers, top_k_router
from moesaic.hf.router_presets import rules, unsupported
from moesaic.layer import MoESpec

SELECTION_BIAS = "gate.e_score_correction_bias"


class Fields(NamedTuple):
    """What configs of these families call the same things.

    Attributes:
        experts: field with the number of experts.
        shared: field with the number of shared experts.
        layers: field that says which layers are MoE; None where all are.
    """

    experts: str = "n_routed_experts"
    shared: str = "n_shared_experts"
    layers: Literal["first_k_dense_replace", "mlp_layer_types"] | None = "first_k_dense_replace"


DEEPSEEK = Fields()


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
        return {**_block(config, DEEPSEEK), "router": rules.deepseek_v2(config)}

    def restrict(self, config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
        if top_k_router(spec).num_groups is None:
            return _restrict(config, spec, DEEPSEEK) | {"topk_method": "greedy"}
        groups = {"n_group": top_k_router(spec).num_groups, "topk_group": top_k_router(spec).top_k_groups}
        return _restrict(config, spec, DEEPSEEK) | groups | {"topk_method": "group_limited_greedy"}


class DeepseekV3Conversion(FamilyConversion):
    """`deepseek_v3` (arXiv 2412.19437, section 2.1.2) and the families that took its layer over.

    Sigmoid scores, a selection bias, groups by the sum of their two best.
    """

    def __init__(self, fields: Fields = DEEPSEEK) -> None:
        self.fields = fields

    def values(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {**_block(config, self.fields), "router": rules.deepseek_v3(config)}

    def restrict(self, config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
        return _restrict(config, spec, self.fields) | {
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


def _block(config: PreTrainedConfig, fields: Fields) -> dict[str, Any]:
    """What these families share."""
    shared = getattr(config, fields.shared)
    if not shared:
        raise unsupported(config, fields.shared, "is not a number of shared experts", "set it to 1 or more")
    return {
        "experts": {
            "num_experts": getattr(config, fields.experts),
            "intermediate_size": config.moe_intermediate_size,
            "activation": config.hidden_act,
        },
        "shared_experts": {"num_experts": shared},
        "layers": _layers(config, fields),
    }


def _layers(config: PreTrainedConfig, fields: Fields) -> dict[str, Any]:
    if fields.layers == "mlp_layer_types":
        return sparse_layers(config)
    if fields.layers is None:
        return {}
    if config.first_k_dense_replace >= config.num_hidden_layers:
        raise unsupported(
            config, "first_k_dense_replace", "leaves no MoE layer", "use moesaic.upcycle for dense models"
        )
    return {"first_dense": config.first_k_dense_replace}


def _restrict(config: PreTrainedConfig, spec: MoESpec, fields: Fields) -> dict[str, Any]:
    found = {
        fields.experts: spec.experts.num_experts,
        "num_experts_per_tok": top_k_router(spec).top_k,
        "moe_intermediate_size": spec.experts.intermediate_size,
        fields.shared: max(1, spec.shared_width // spec.experts.intermediate_size),
        "routed_scaling_factor": top_k_router(spec).scaling_factor,
        **activation_field(config, spec),
    }
    if fields.layers == "mlp_layer_types":
        return found | mlp_layer_types(config, spec)
    if fields.layers is None:
        return found
    return found | {"first_k_dense_replace": min(spec.layers.indices(config.num_hidden_layers))}
