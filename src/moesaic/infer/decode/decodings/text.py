"""The short form of decodings: `greedy`, `sample temperature=0.7`, `self-contrast beta=0.5 weak=rank=3`; braces make grids."""

from __future__ import annotations

import difflib
import itertools
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin

from moesaic.errors import ConfigError
from moesaic.infer.decode.decodings.base import DecodingStrategy
from moesaic.infer.decode.overrides import OverrideSpec

FIELD = "decode"
PLAIN = ("greedy", "sample", "beam")
_BEAMS = 4
_PLAIN_VALUES = (str, int, float, tuple, OverrideSpec, type(None))
_INTEGERS = re.compile(r"\d+(,\d+)*")
_SPAN = re.compile(r"(-?\d+)\.\.(-?\d+)")
_INNERMOST = re.compile(r"\{([^{}]*)\}")


def values_of_text(
    text: str, kinds: Iterable[type[DecodingStrategy]], shared: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a spec that a text says, and those that its first word means where nothing else is said.

    Args:
        text: a name, and fields as name=value, separated by spaces; quotes as in a shell.
        kinds: of strategies.
        shared: fields that all decodings have.

    Raises:
        ConfigError: naming the word or the field that is wrong.
    """
    if "{" in text or "}" in text:
        raise ConfigError(
            FIELD, text, "is a grid, and one decoding is wanted", "choose one value in place of the braces"
        )
    name, *words = _words(text)
    name = name.replace("_", "-")
    strategies = {called: kind for kind in kinds for called in (text_name(kind), _type(kind))}
    if name not in PLAIN and name not in strategies:
        raise _unknown(FIELD, name, "is no decoding", [*PLAIN, *strategies])
    kind = strategies.get(name)
    known = [*(_own_fields(kind) if kind else ()), *shared]
    values: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for word in words:
        field, equals, value = word.partition("=")
        if not equals or not value:
            raise ConfigError(FIELD, text, f"has a word that is no field: {word!r}", "write name=value, without spaces")
        if field not in known:
            raise _unknown(f"{FIELD}.{field}", value, f"is not a field of {name}", known)
        if field in values or field in own:
            raise ConfigError(f"{FIELD}.{field}", value, "stands there twice", "remove one")
        if kind is not None and field not in shared:
            own[field] = _value(kind, field, value)
        else:
            values[field] = value
    if kind is not None:
        return {**values, "strategy": kind.from_dict(own, where=FIELD)}, {}
    return _plain(name, values)


def text_name(kind: type[DecodingStrategy]) -> str:
    """What a kind of strategy is called in texts."""
    return kind.alias or _type(kind)


def _type(kind: type[DecodingStrategy]) -> str:
    return str(kind.model_fields["type"].default).replace("_", "-")


def text_of(name: str, fields: Mapping[str, Any]) -> str:
    """The text that says this."""
    words = [f"{field}={_text(value)}" for field, value in fields.items()]
    return " ".join([name, *map(shlex.quote, words)])


def own_values(strategy: DecodingStrategy) -> dict[str, Any]:
    """The fields of a strategy that are not at their defaults; those that are not plain values as they are written down."""
    changed: dict[str, Any] = {}
    for field, info in type(strategy).model_fields.items():
        value = getattr(strategy, field)
        if field == "type" or (not info.is_required() and value == info.get_default(call_default_factory=True)):
            continue
        plain = isinstance(value, _PLAIN_VALUES)
        changed[field] = value if plain else strategy.model_dump(mode="json", include={field})[field]
    return changed


def expanded(text: str) -> list[str]:
    """The texts that one with braces stands for: `{a,b}` for a and b, `{1..8}` for whole numbers; the last braces change first.

    Raises:
        ConfigError: for braces without a partner or without a choice.
    """
    parts = _INNERMOST.split(text)
    fixed, braces = parts[::2], parts[1::2]
    if any("{" in part or "}" in part for part in fixed):
        raise ConfigError(FIELD, text, "has braces that are not closed, or one inside another", "write {1,2} or {1..8}")
    chosen = itertools.product(*(_choices(inner, text) for inner in braces))
    found = ("".join(itertools.chain(*zip(fixed, [*choice, ""], strict=True))) for choice in chosen)
    return list(dict.fromkeys(found))


def _choices(inner: str, text: str) -> list[str]:
    span = _SPAN.fullmatch(inner.strip())
    if span:
        first, last = int(span[1]), int(span[2])
        choices = [str(number) for number in range(first, last + 1)]
    else:
        choices = [choice.strip() for choice in inner.split(",")]
    if not choices or not all(choices):
        raise ConfigError(FIELD, text, f"has braces without a choice: {{{inner}}}", "write {1,2} or {1..8}")
    return choices


def _words(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(FIELD, text, f"can't be read ({error})", "close the quotes") from None
    if not words:
        raise ConfigError(FIELD, text, "says nothing", f"begin with a name, such as {PLAIN[0]}")
    return words


def _plain(name: str, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Decodings of transformers: what their names say, and what they leave open."""
    if name == "greedy":
        for field, only in (("temperature", 0.0), ("num_beams", 1)):
            said = values.setdefault(field, only)
            if _number(said) != only:
                remedy = "use sample" if field == "temperature" else "use beam"
                raise ConfigError(f"{FIELD}.{field}", said, "is not greedy", remedy)
        return values, {}
    if name == "sample":
        if _number(values.get("temperature")) == 0:
            raise ConfigError(f"{FIELD}.temperature", values["temperature"], "does not sample", "use greedy")
        return values, {"temperature": 1.0}
    if _number(values.get("num_beams")) == 1:
        raise ConfigError(f"{FIELD}.num_beams", values["num_beams"], "is no beam search", "use greedy or sample")
    return values, {"num_beams": _BEAMS}


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None  # an error of its own when the spec is made


def _own_fields(kind: type[DecodingStrategy]) -> list[str]:
    return [*(field for field in kind.model_fields if field != "type"), *(["preset"] if kind.presets else [])]


def _value(kind: type[DecodingStrategy], field: str, text: str) -> Any:
    """What a field's text stands for, where its own validation does not know: nothing, or several whole numbers."""
    annotation = kind.model_fields[field].annotation if field in kind.model_fields else None
    choices = (annotation, *get_args(annotation))
    if text == "none" and type(None) in choices:
        return None
    if _INTEGERS.fullmatch(text) and any(get_origin(choice) is tuple for choice in choices):
        return [int(number) for number in text.split(",")]
    return text


def _text(value: Any) -> str:
    if isinstance(value, OverrideSpec):
        return value.text
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return "none" if value is None else str(value)


def _unknown(field: str, value: Any, problem: str, known: Iterable[str]) -> ConfigError:
    names = list(known)
    close = difflib.get_close_matches(field.rsplit(".", 1)[-1] if "." in field else str(value), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(field, value, problem, f"{hint}known here: {', '.join(names)}")
