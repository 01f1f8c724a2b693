"""The short form of overrides, read and written: `rank=2`, `k=4+without=3,7+temperature=0.5`, `experts=0,1@2-4`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError
from moesaic.layer.overrides import OverridePart

SYNTAX = (
    "write parts as k=4, rank=2, random=1 (or random=1:SEED), experts=0,3, without=5, dynamic=0.5 (or dynamic=0.5:MOST), null=0.1 (or null=0.1:kept), scale=2, "
    "total=1, temperature=0.5 or replay=FOLDER, joined by +, each for all layers or as k=4@0-3,7 for some"
)
_PART = re.compile(r"(?P<name>[a-z]+)=(?P<value>[^@]+)(?:@(?P<layers>.+))?")


def parts_of_text(text: str) -> list[dict[str, Any]]:
    """The parts that a text says, as mappings.

    Raises:
        ConfigError: if it is not such a text.
    """
    return [_part(one.strip(), text) for one in text.split("+")]


def _part(text: str, whole: str) -> dict[str, Any]:
    matched = _PART.fullmatch(text)
    if matched is None or matched["name"] not in _VALUES:
        raise ConfigError("override", whole, f"has a part that is none: {text!r}", SYNTAX)
    name = matched["name"]
    try:
        part: dict[str, Any] = {"type": name, **_VALUES[name](name, matched["value"].strip())}
        if matched["layers"]:
            part["layers"] = _layers(matched["layers"])
    except ValueError:
        raise ConfigError("override", whole, f"has a part that can't be read: {text!r}", SYNTAX) from None
    return part


def _integer(name: str, value: str) -> dict[str, Any]:
    return {name: int(value)}


def _number(name: str, value: str) -> dict[str, Any]:
    return {name: float(value)}


def _integers(name: str, value: str) -> dict[str, Any]:
    return {name: [int(one) for one in value.split(",")]}


def _path(name: str, value: str) -> dict[str, Any]:
    return {name: value}


def _drawn(name: str, value: str) -> dict[str, Any]:
    count, colon, seed = value.partition(":")
    return {name: int(count)} | ({"seed": int(seed)} if colon else {})


def _at_most(name: str, value: str) -> dict[str, Any]:
    share, colon, most = value.partition(":")
    return {name: float(share)} | ({"most": int(most)} if colon else {})


def _dropped(name: str, value: str) -> dict[str, Any]:
    share, colon, weights = value.partition(":")
    return {name: float(share)} | ({"weights": weights} if colon else {})


def _layers(text: str) -> list[int]:
    found: list[int] = []
    for span in text.split(","):
        first, dash, last = span.partition("-")
        if dash and int(last) < int(first):
            raise ValueError(span)
        found += range(int(first), int(last if dash else first) + 1)
    return found


_VALUES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "k": _integer,
    "rank": _integers,
    "random": _drawn,
    "experts": _integers,
    "without": _integers,
    "dynamic": _at_most,
    "null": _dropped,
    "scale": _number,
    "total": _number,
    "temperature": _number,
    "replay": _path,
}
# What follows the colon of a part's value.
_SECOND = {"random": "seed", "dynamic": "most", "null": "weights"}


def text_of_parts(parts: Iterable[OverridePart]) -> str:
    """The text that says these parts; `parts_of_text` reads it back.

    Raises:
        ConfigError: for what no text says: settings of a replayed trace, or one in memory.
    """
    return "+".join(map(_text_of, parts))


def _text_of(part: OverridePart) -> str:
    name, fields = part.name, type(part).model_fields
    text = f"{name}={_value_text(getattr(part, name))}"
    for field in fields.keys() - {"type", "layers", name}:
        value = getattr(part, field)
        if value == fields[field].default:
            continue
        if field != _SECOND.get(name):
            raise ConfigError(f"{name}.{field}", value, "can't be said in a text", "use YAML, or the object itself")
        text += f":{value}"
    if name == "replay" and not isinstance(getattr(part, name), str | Path):
        raise ConfigError(name, getattr(part, name), "is a trace in memory", "write it to disk and give its folder")
    return text if part.layers is None else f"{text}@{_spans(part.layers)}"


def _value_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _spans(layers: Sequence[int]) -> str:
    """Runs of consecutive layers as first-last."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
