"""From a stock config to a router config of ours."""

from __future__ import annotations

from transformers import PreTrainedConfig

from moesaic.errors import ConfigError, UnsupportedModel
from moesaic.hf.router_presets.base import RouterPreset
from moesaic.hf.router_presets.table import ROUTER_PRESETS, UNSUPPORTED_ROUTERS
from moesaic.layer import HashConfig, ModalityConfig, NullExpertsConfig, RouterConfig, TopKConfig

KINDS = {"top_k": TopKConfig, "hash": HashConfig, "modality": ModalityConfig, "null_experts": NullExpertsConfig}


def router_preset(config: PreTrainedConfig, layer: int | None = None) -> RouterConfig:
    """The routing of a stock MoE model as a router config of ours.

    Args:
        config: of a model, or its text part.
        layer: index of a decoder layer, for configs whose layers route by different rules.

    Raises:
        UnsupportedModel: if the family is not known or none of our fields says what it does, with the reason.
    """
    presets = presets_of(config)
    if config.model_type != presets[0].model_type:
        config = config.get_text_config()
    for preset in presets:
        if preset.layers is None:
            return rule_of(preset, config)
        layers = set(preset.layers(config))
        if layer in layers or (layer is None and layers == set(range(config.num_hidden_layers))):
            return rule_of(preset, config)
    if layer is None:
        raise UnsupportedModel(f"{config.model_type}: layers route by different rules; say which layer is meant")
    raise UnsupportedModel(f"{config.model_type}: no router here does what layer {layer} does")


def rule_of(preset: RouterPreset, config: PreTrainedConfig) -> RouterConfig:
    """What one preset makes of a config; errors as for `router_preset`."""
    rule = {"type": "top_k", **preset.rule(config)}
    try:
        return KINDS[rule["type"]].from_dict(rule, where="router")
    except ConfigError as error:
        raise UnsupportedModel(f"{config.model_type}: {error}") from None


def presets_of(config: PreTrainedConfig) -> list[RouterPreset]:
    """The presets of a config or of its text part, mostly one.

    Raises:
        UnsupportedModel: if there is none, with the reason.
    """
    for candidate in (config, config.get_text_config()):
        found = [preset for preset in ROUTER_PRESETS.values() if preset.model_type == candidate.model_type]
        if found:
            return found
    family = _family(config)
    if family in UNSUPPORTED_ROUTERS:
        raise UnsupportedModel(f"{config.model_type}: {UNSUPPORTED_ROUTERS[family]}; no router here does that")
    known = sorted({preset.model_type for preset in ROUTER_PRESETS.values()})
    raise UnsupportedModel(
        f"model_type = {config.model_type!r} is not a known MoE family; known are {', '.join(known)}"
    )


def _family(config: PreTrainedConfig) -> str:
    modules = [kind.__module__ for kind in type(config).__mro__ if kind.__module__.startswith("transformers.models.")]
    return modules[0].split(".")[2] if modules else ""
