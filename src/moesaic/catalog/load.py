"""Finding and reading presets and the records of models."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import resources
from typing import Any

from moesaic.catalog.schema import ModelRecord, Preset
from moesaic.catalog.shape import Shape
from moesaic.configuration import read_yaml
from moesaic.errors import ConfigError

_ROOT = resources.files("moesaic.catalog")
_PRESETS, _RECORDS = _ROOT / "data", _ROOT / "models"
_SUFFIX = ".yaml"


def presets() -> tuple[str, ...]:
    """Names of all presets, in alphabetical order."""
    return tuple(sorted(file.name.removesuffix(_SUFFIX) for file in _PRESETS.iterdir() if file.name.endswith(_SUFFIX)))


def preset(name: str) -> Preset:
    """The preset called `name`.

    Example:
        ```python
        found = moesaic.preset("deepseekmoe-16b")
        model = moesaic.build(found.backbone, found.moe)
        ```

    Raises:
        ConfigError: if there is none of that name, with the names that come close; or if there is a model of that name
            that can't be built, with the reason and presets that come close to it.
    """
    known = presets()
    if name not in known:
        record = _records().get(name)
        if record is not None:
            found = _record(name, record)
            assert found.unbuildable is not None, "a record without a preset says why"
            near = " or ".join(map(repr, found.unbuildable.near))
            raise ConfigError(
                "preset", name, f"can't be built: {found.unbuildable.reason}", f"the nearest that can be is {near}"
            )
        raise ConfigError("preset", name, "is not a preset", f"{did_you_mean(name, known)}known are {', '.join(known)}")
    with resources.as_file(_PRESETS / f"{name}{_SUFFIX}") as path:
        return Preset.from_dict({"name": name, **read_yaml(path)}, where=name)


def models() -> tuple[ModelRecord, ...]:
    """The records of all models, in alphabetical order of their names."""
    return tuple(_record(name, values) for name, values in sorted(_records().items()))


def model(name: str) -> ModelRecord:
    """The record of one model.

    Raises:
        ConfigError: if there is none of that name, with the names that come close.
    """
    records = _records()
    if name not in records:
        raise ConfigError(
            "model",
            name,
            "is not in the catalogue",
            f"{did_you_mean(name, records)}`moesaic catalog models` lists them",
        )
    return _record(name, records[name])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The names that come close to one that is not known, as the beginning of a sentence; empty if none do."""
    close = difflib.get_close_matches(str(name).lower(), list(known), n=3)
    return f"did you mean {' or '.join(map(repr, close))}? " if close else ""


def _records() -> dict[str, dict[str, Any]]:
    """What the files of models say, by name."""
    found: dict[str, dict[str, Any]] = {}
    for file in _RECORDS.iterdir():
        if file.name.endswith(_SUFFIX):
            with resources.as_file(file) as path:
                found |= read_yaml(path)
    return found


def _record(name: str, values: dict[str, Any]) -> ModelRecord:
    """The record of a model; what its preset says is taken from there."""
    derived: dict[str, Any] = {}
    if name in presets():
        built = preset(name)
        derived = {field: getattr(built, field) for field in ("title", "source", "published", "notes", "deviations")}
        derived["shape"] = Shape.of(built)
    return ModelRecord.from_dict({"name": name, "buildable": bool(derived), **values, **derived}, where=name)
