"""The short form of overrides: `rank=2`, `k=4+without=3,7+temperature=0.5`, `experts=0,1@2-4`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from moesaic.errors import ConfigError

SYNTAX = (
    "write parts as k=4, rank=2, random=1 (or random=1:SEED), experts=0,3, without=5, dynamic=0.5, null=0.1, scale=2, "
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
    "dynamic": _number,
    "null": _number,
    "scale": _number,
    "total": _number,
    "temperature": _number,
    "replay": _path,
}
