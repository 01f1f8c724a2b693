"""What a preset says."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from moesaic.configuration import Config
from moesaic.errors import ConfigError
from moesaic.layer import MoESpec


class ParameterCount(Config):
    """A number of parameters as its authors print it.

    Attributes:
        billions: the number in billions.
        tolerance: largest relative difference from the model built here, which covers rounding of the printed number.
        counts: what the authors count: the whole "model", the model "without_input_embedding" or
            "without_embeddings" (neither input embedding nor output head), or the "experts" alone, shared ones
            included.
    """

    billions: PositiveFloat
    tolerance: float = Field(default=0.005, gt=0, lt=0.1)
    counts: Literal["model", "without_input_embedding", "without_embeddings", "experts"] = "model"


class PublishedParameters(Config):
    """Parameter counts of a release.

    Attributes:
        total: all parameters.
        active: parameters that one token uses: all but the routed experts it does not pick.
    """

    total: ParameterCount
    active: ParameterCount


class Preset(Config):
    """A published model, or a tiny one of the same design.

    Attributes:
        name: what `preset` takes.
        title: the model's own name.
        source: where the values come from.
        backbone: fields of the transformers config, with `model_type`; what is not given keeps that class's default.
        moe: the MoE layers. Balance losses are the ones of the original training where those are known and can be
            said, else there are none.
        published: parameter counts to check against; None for models that nobody released.
        notes: what a reader should know: derived values, what the spec can't say.
    """

    name: str
    title: str
    source: str
    backbone: dict[str, Any]
    moe: MoESpec
    published: PublishedParameters | None = None
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Preset:
        for field in ("model_type", "num_hidden_layers"):
            if field not in self.backbone:
                raise ConfigError(f"backbone.{field}", None, "is required", "set it")
        self.moe.layers.indices(self.backbone["num_hidden_layers"])
        return self
