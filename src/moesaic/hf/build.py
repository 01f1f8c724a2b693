"""`build`: a model with random weights from a backbone and a spec."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from moesaic.errors import ConfigError
from moesaic.files import is_local
from moesaic.hf.configuration import MoesaicConfig
from moesaic.hf.families import family_of
from moesaic.hf.model import MoesaicForCausalLM
from moesaic.layer import MoESpec

Backbone = PreTrainedConfig | Mapping[str, Any] | str | Path


def read_backbone(backbone: Backbone) -> PreTrainedConfig:
    """The config of a backbone given as config, dict with `model_type`, or path of a config or checkpoint.

    Raises:
        ConfigError: if the dict names no known model type, has a misspelt key or a value that the type refuses, or if
            the path has no config.
    """
    if isinstance(backbone, PreTrainedConfig):
        return backbone
    if isinstance(backbone, Mapping):
        return _from_values(backbone)
    if is_local(backbone) and not Path(backbone).expanduser().exists():
        raise ConfigError("backbone", str(backbone), "does not exist", "give a folder with config.json or a hub name")
    try:
        return AutoConfig.from_pretrained(backbone)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "backbone",
            str(backbone),
            f"has no readable config ({str(error).splitlines()[0]})",
            "give a folder with config.json",
        ) from None


def _from_values(backbone: Mapping[str, Any]) -> PreTrainedConfig:
    values = dict(backbone)
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            "backbone.model_type", model_type, "is not a model type of transformers", "use for example llama"
        )
    try:
        config = AutoConfig.for_model(model_type, **values)
        known = vars(type(config)())
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigError("backbone", dict(backbone), "is not valid", f"{model_type} says: {reason}") from error
    # Stock configs keep any key they are given, and some models read keys that their config does not declare (head_dim
    # of qwen3_moe). So only what looks misspelt is refused.
    for name in values.keys() & vars(config).keys() - known.keys():
        if close := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            raise ConfigError(
                f"backbone.{name}", values[name], f"is not a key of {model_type}", f"did you mean {close[0]!r}?"
            )
    return config


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
