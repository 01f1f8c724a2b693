"""A routing override as data: parts, from objects, YAML or a short text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from moesaic.configuration import Config, read_yaml
from moesaic.errors import ConfigError
from moesaic.infer.decode.overrides.replayed import ReplayedTrace
from moesaic.infer.decode.overrides.text import parts_of_text, text_of_parts
from moesaic.layer.overrides import (
    DynamicExperts,
    FixedExperts,
    NullBelow,
    OverridePart,
    RandomExperts,
    Rank,
    ScaledWeights,
    TemperedWeights,
    TopK,
    TotalWeights,
    WithoutExperts,
)

AnyPart = Annotated[
    TopK
    | Rank
    | RandomExperts
    | FixedExperts
    | WithoutExperts
    | DynamicExperts
    | ReplayedTrace
    | NullBelow
    | ScaledWeights
    | TotalWeights
    | TemperedWeights,
    Field(discriminator="type"),
]


class OverrideSpec(Config):
    """What changes in the routing of a model.

    Attributes:
        parts: what acts, in the order of their phases: experts left out, experts chosen, picks dropped, weights changed;
            within a phase as they stand. One part may choose in a layer. No parts change nothing.
    """

    parts: tuple[AnyPart, ...] = ()

    @property
    def text(self) -> str:
        """The short text that says it; nothing for no parts.

        Raises:
            ConfigError: for what no text says: settings of a replayed trace, or one in memory.
        """
        return text_of_parts(self.parts)

    @classmethod
    def of(cls, given: OverrideLike) -> OverrideSpec:
        """From anything that says one: a spec, a part, several, a mapping, a short text, or the path of a YAML file.

        Raises:
            ConfigError: naming the part and field that is wrong.
        """
        if isinstance(given, OverrideSpec):
            return given
        if isinstance(given, OverridePart):
            return cls.from_dict({"parts": [given]}, where="override")
        if isinstance(given, Path) or (isinstance(given, str) and given.endswith((".yaml", ".yml"))):
            return cls.from_dict(read_yaml(given), where="override")
        if isinstance(given, str):
            return cls.from_dict({"parts": parts_of_text(given)}, where="override")
        if isinstance(given, Mapping):
            values = dict(given) if "parts" in given or not given else {"parts": [dict(given)]}
            return cls.from_dict(values, where="override")
        if isinstance(given, Sequence):
            return cls.from_dict({"parts": [part for one in given for part in cls.of(one).parts]}, where="override")
        raise ConfigError(
            "override", given, "says no override", "give a text such as 'rank=2', parts, or the path of a YAML file"
        )


OverrideLike = OverrideSpec | OverridePart | Sequence[Any] | Mapping[str, Any] | str | Path


@dataclass(frozen=True)
class ByRow:
    """A spec, or None, for each row."""

    rows: tuple[OverrideSpec | None, ...]

    @classmethod
    def of(cls, given: Sequence[OverrideLike | None]) -> ByRow:
        """From what says them; rows with the same object share one spec."""
        known: dict[int, OverrideSpec] = {}
        for one in given:
            if one is not None and id(one) not in known:
                known[id(one)] = OverrideSpec.of(one)
        return cls(tuple(None if one is None else known[id(one)] for one in given))
