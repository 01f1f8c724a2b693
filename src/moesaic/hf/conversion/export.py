"""`export`: our model as one of a stock family, or the reason why no stock family says the same."""

from __future__ import annotations

import copy
import logging
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.errors import UnsupportedExport, UnsupportedModel
from moesaic.hf.conversion.base import FamilyConversion, top_k_router
from moesaic.hf.conversion.registry import CONVERSIONS, conversion_of
from moesaic.hf.conversion.siblings import sparse_sibling
from moesaic.hf.families import family_of
from moesaic.hf.model import MoesaicForCausalLM
from moesaic.hf.transplant import decoder_layers, transplant_back
from moesaic.layer import LoadBalancing, MoESpec, TopKConfig
from moesaic.layer.balance.conversions import to_transformers
from moesaic.layer.schedule import value_at

logger = logging.getLogger(__name__)


def export(model: MoesaicForCausalLM) -> PreTrainedModel:
    """A stock transformers model with the weights of `model` and the same logits in float32.

    A backbone of an MoE family goes back to that family; dense backbones go to the MoE family with the same decoder
    (docs/convert.md lists both). `save_pretrained` of the result writes that family's own tensor names. Weights are
    copied. Balance losses do not carry over; a warning says how to come close.

    Args:
        model: from `convert`, `build`, `upcycle` or a checkpoint.

    Raises:
        UnsupportedExport: if the family can't say exactly what the model computes, naming the field.
    """
    _check_layers(model)
    spec = model.config.spec
    config = _stock_config(model.config.get_text_config(), spec)
    conversion = conversion_of(config)
    _carry_balance(config, conversion, spec)

    def block_tensors(block: nn.Module) -> dict[str, Tensor]:
        return conversion.to_stock(block.state_dict())

    return transplant_back(model, config, block_tensors)


def _stock_config(backbone: PreTrainedConfig, spec: MoESpec) -> PreTrainedConfig:
    """The config with which a stock family computes what `backbone` with `spec` computes."""
    top_k_router(spec)
    if spec.per_layer:
        raise UnsupportedExport("moe.layers: stock families have the same number of experts and picks in every layer")
    config = copy.deepcopy(backbone) if backbone.model_type in CONVERSIONS else sparse_sibling(backbone)
    conversion = conversion_of(config)
    # A config that says the same already keeps its own way of saying it.
    if _differences(config, conversion, spec):
        for name, value in conversion.restrict(config, spec).items():
            setattr(config, name, value)
        differences = _differences(config, conversion, spec)
        if differences:
            raise UnsupportedExport(f"family {config.model_type} can't say {'; '.join(differences)}")
    return config


def _check_layers(model: MoesaicForCausalLM) -> None:
    """Layers outside the spec that the backbone's own config makes MoE hold stock blocks, which are not ours to map."""
    family = family_of(model.config.get_text_config())
    layers = decoder_layers(model.model.backbone, model.config.get_text_config())
    left = [
        index
        for index, layer in enumerate(layers)
        if index not in model.moe_blocks() and hasattr(getattr(layer, family.feed_forward), "experts")
    ]
    if left:
        raise UnsupportedExport(
            f"moe.layers: layers {left} hold MoE blocks of the backbone's own config beside those of the spec; "
            "build the model with a spec that covers them, or on a dense backbone"
        )


def _differences(config: PreTrainedConfig, conversion: FamilyConversion, spec: MoESpec) -> list[str]:
    """What the stock model with `config` would do otherwise than `spec`, field by field."""
    try:
        said = conversion.spec(config)
    except UnsupportedModel as error:
        return [str(error)]
    count = config.num_hidden_layers
    ours, theirs = _meaning(spec, count), _meaning(said, count)
    return [
        f"moe.{name} = {ours[name]!r} (there it is {theirs[name]!r})" for name in ours if ours[name] != theirs[name]
    ]


def _meaning(spec: MoESpec, num_layers: int) -> dict[str, Any]:
    """All fields that matter for logits and gradients; what means the same is written the same."""
    experts, router = spec.experts.to_dict(), spec.router.to_dict()
    del experts["kernel"], router["stable_ties"]
    if experts["activation"] == "swish":
        experts["activation"] = "silu"
    if not router["normalize_top_k"]:
        router["normalization_epsilon"] = 0.0
    if router["softmax_over"] == "selected":
        router |= {"softmax_over": "all", "normalize_top_k": True}
    if router["num_groups"] == router["top_k_groups"]:
        defaults = TopKConfig(top_k=1).to_dict()
        router |= {name: defaults[name] for name in ("num_groups", "top_k_groups", "group_score", "group_mask_value")}
    return {
        **{f"experts.{name}": value for name, value in experts.items()},
        **{f"router.{name}": value for name, value in router.items()},
        "shared_experts width": spec.shared_width,
        "shared_experts.placement": "parallel" if spec.shared_experts is None else spec.shared_experts.placement,
        "shared_experts.sigmoid_gate": spec.shared_experts is not None and spec.shared_experts.sigmoid_gate,
        "capacity": None if spec.capacity is None else spec.capacity.to_dict(),
        "depth": None if spec.depth is None else spec.depth.to_dict(),
        "layers": spec.layers.indices(num_layers),
        "dense_layers": None if spec.dense_layers is None else spec.dense_layers.to_dict(),
        "dropout": spec.dropout,
    }


def _carry_balance(config: PreTrainedConfig, conversion: FamilyConversion, spec: MoESpec) -> None:
    """Keep the config's own balance loss if it is the spec's, else switch it off and say so."""
    if conversion.spec(config).balance == spec.balance:
        return
    config.output_router_logits = False
    num_layers = len(spec.layers.indices(config.num_hidden_layers))
    for loss in spec.balance:
        advice = "it has no counterpart there"
        if isinstance(loss, LoadBalancing) and loss.counts == "all" and hasattr(config, "router_aux_loss_coef"):
            coefficient = to_transformers(value_at(loss.coefficient, 1.0), top_k_router(spec).top_k, num_layers)
            advice = f"output_router_logits=True with router_aux_loss_coef={coefficient:g} comes close in training"
        logger.warning("export to %s drops the balance loss %s: %s", config.model_type, loss.name, advice)
