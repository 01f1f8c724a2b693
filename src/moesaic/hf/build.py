"""`build`: a model with random weights from a backbone and a spec."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from moesaic.errors import ConfigError
from moesaic.hf.configuration import MoesaicConfig
from moesaic.hf.families import family_of
from moesaic.hf.model import MoesaicForCausalLM
from moesaic.layer import MoESpec

Backbone = PreTrainedConfig | Mapping[str, Any] | str | Path


def read_backbone(backbone: Backbone) -> PreTrainedConfig:
    """The config of a backbone given as config, dict with `model_type`, or path of a config or checkpoint.

    Raises:
        ConfigError: if the dict names no known model type or the path has no config.
    """
    if isinstance(backbone, PreTrainedConfig):
        return backbone
    if isinstance(backbone, Mapping):
        values = dict(backbone)
        model_type = values.pop("model_type", None)
        try:
            return AutoConfig.for_model(model_type, **values)
        except ValueError:
            raise ConfigError(
                "backbone.model_type", model_type, "is not a model type of transformers", "use for example llama"
            ) from None
    try:
        return AutoConfig.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "backbone",
            str(backbone),
            f"has no readable config ({str(error).splitlines()[0]})",
            "give a folder with config.json",
        ) from None


def build(backbone: Backbone, spec: MoESpec | Mapping[str, Any]) -> MoesaicForCausalLM:
    """A language model with random weights: `backbone` with the MoE layers of `spec`.

    Args:
        backbone: stock config, dict with `model_type`, or path.
        spec: the MoE layers.

    Raises:
        ConfigError: if a field is invalid.
        UnsupportedModel: if the backbone's family is not supported.
    """
    config = read_backbone(backbone)
    family_of(config)
    if not isinstance(spec, MoESpec):
        spec = MoESpec.from_dict(spec, where="moe")
    return MoesaicForCausalLM(MoesaicConfig(backbone=config, moe=spec.to_dict()))
