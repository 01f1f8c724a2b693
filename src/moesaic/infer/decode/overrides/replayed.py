"""The picks of a trace as a part of an override."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_serializer, field_validator, model_validator
from torch import nn

from moesaic.errors import ConfigError
from moesaic.hf.overridable import Overridable
from moesaic.layer import Router
from moesaic.layer.overrides import OverridePart, Phase, Picking
from moesaic.trace import TraceFile
from moesaic.trace.replay import Replay, Weights, replay_of


class ReplayedTrace(OverridePart):
    """The picks of a trace, as `moesaic.replay` has them, for parts after it to drop or weigh.

    Attributes:
        replay: a trace's folder, or a trace in memory.
        weights: "router" or "trace"; see `moesaic.replay`.
        documents: the trace's document for each that arrives; see `moesaic.replay`. With overrides by row only rows that
            have this part count.
    """

    phase: ClassVar = Phase.CHOOSE
    reweighs: ClassVar = False

    type: Literal["replay"] = "replay"
    replay: Any
    weights: Weights = "router"
    documents: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _in_all_layers(self) -> ReplayedTrace:
        if self.layers is not None:
            raise ConfigError("layers", list(self.layers), "can't restrict a trace, which has all layers", "remove it")
        return self

    @field_validator("replay")
    @classmethod
    def _is_a_trace(cls, value: Any) -> Any:
        if isinstance(value, str | Path) or (hasattr(value, "header") and hasattr(value, "rows")):
            return value
        raise ConfigError("replay", value, "is no trace", "give the folder of one, or a trace in memory")

    @field_serializer("replay")
    def _as_path(self, value: Any) -> str:
        return str(value)

    def factory(self, model: nn.Module, found: Overridable) -> Replay:
        """The replay for a model; reads the trace.

        Raises:
            TraceError: if it is another model's.
        """
        log = TraceFile(self.replay) if isinstance(self.replay, str | Path) else self.replay
        return replay_of(model, found, log, weights=self.weights, documents=self.documents, any_k=True)

    def apply(self, picking: Picking) -> Picking:
        raise AssertionError("replays act before the parts of the layer room, on whole forward passes")


def check_replays(parts: tuple[OverridePart, ...], routers: Mapping[int, Router]) -> None:
    """Refuse parts that a trace, which has the picks of all layers, leaves no room for.

    Raises:
        ConfigError: naming the part.
    """
    if not any(isinstance(part, ReplayedTrace) for part in parts):
        return
    for part in parts:
        if part.phase is Phase.ADMIT:
            raise ConfigError(
                part.name,
                part.to_dict()["type"],
                "leaves out experts that the replayed trace may have picked",
                "use one of the two",
            )
