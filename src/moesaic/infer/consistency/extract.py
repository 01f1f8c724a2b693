"""The answer in a generated text: by pattern, by function, or by one of the usual rules."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, get_args

from moesaic.errors import ConfigError
from moesaic.infer.consistency.normalise import (
    NUMBER,
    normalise_exact,
    normalise_letter,
    normalise_number,
    normalise_text,
)

# What finds the answer in a text; None where there is none, which is an abstention.
Extractor = Callable[[str], str | None]
Normaliser = Callable[[str], str | None]

Comparison = Literal["number", "text", "letter", "exact"]
Preset = Literal["last_number", "choice_letter", "after_marker", "whole"]

NORMALISERS: dict[Comparison, Normaliser] = {
    "number": normalise_number,
    "text": normalise_text,
    "letter": normalise_letter,
    "exact": normalise_exact,
}
_NUMBER = re.compile(NUMBER)
# From the clearest way to name a choice to the least clear; "A" before a word is the article.
_LETTERS = (
    re.compile(r"answer\s*(?:is|:|=)\s*\**\s*\(?([A-Ja-j])\b", re.IGNORECASE),
    re.compile(r"\(([A-J])\)"),
    re.compile(r"(?<!\w)([A-J])(?=[).:,]|\s*$)", re.MULTILINE),
)


def by_pattern(
    pattern: str, compare: Comparison = "text", *, which: Literal["first", "last"] = "last", field: str = "pattern"
) -> Extractor:
    """What a regular expression finds.

    Args:
        pattern: has one group, or one named `answer`: the answer.
        compare: how answers are compared, and so normalised; what can't be is an abstention.
        which: of several matches.
        field: name of the pattern in errors.

    Raises:
        ConfigError: if `pattern` is not a regular expression, or it is not clear which group is the answer.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(field, pattern, f"is not a regular expression ({error})", "correct it") from None
    if not compiled.groups:
        raise ConfigError(field, pattern, "has no group", "put the answer in brackets, as in 'answer is (.+)'")
    if compiled.groups > 1 and "answer" not in compiled.groupindex:
        raise ConfigError(
            field,
            pattern,
            f"has {compiled.groups} groups",
            "name the one that holds the answer, (?P<answer>...), or write the others as (?:...)",
        )
    group: str | int = "answer" if "answer" in compiled.groupindex else 1
    normalise = normaliser(compare)

    def extract(text: str) -> str | None:
        matches = list(compiled.finditer(text))
        if not matches:
            return None
        found = matches[-1 if which == "last" else 0][group]
        return None if found is None else normalise(found)

    return extract


def by_function(function: Callable[[str], str | None], compare: Comparison = "exact") -> Extractor:
    """What `function` finds in a text, normalised; None from it is an abstention."""
    normalise = normaliser(compare)

    def extract(text: str) -> str | None:
        found = function(text)
        return None if found is None else normalise(found)

    return extract


def last_number(compare: Comparison = "number") -> Extractor:
    """The last number of a text."""
    return by_function(lambda text: max(_NUMBER.findall(text)[-1:], default=None), compare)


def choice_letter(compare: Comparison = "letter") -> Extractor:
    """The letter, A to J, of the choice that a text names.

    "answer is B" counts before "(B)", that before "B)" or a lone "B" at the end of a line; of several the last.
    """

    def find(text: str) -> str | None:
        for pattern in _LETTERS:
            if found := pattern.findall(text):
                return found[-1]
        return None

    return by_function(find, compare)


def after_marker(marker: str = "####", compare: Comparison = "number") -> Extractor:
    """What stands on the line of the last `marker`, after it; of numbers the first there.

    Raises:
        ConfigError: if `marker` is empty.
    """
    if not marker:
        raise ConfigError("marker", marker, "is empty", "give the text that stands before answers, as '####'")

    def find(text: str) -> str | None:
        _, found, rest = text.rpartition(marker)
        line = rest.strip().split("\n", 1)[0].strip() if found else ""
        if compare == "number":
            number = _NUMBER.search(line)
            return number[0] if number else None
        return line or None

    return by_function(find, compare)


def whole(compare: Comparison = "text") -> Extractor:
    """All of a text."""
    return by_function(str.strip, compare)


def by_preset(preset: Preset, compare: Comparison | None = None, *, marker: str = "####") -> Extractor:
    """An extractor by name.

    Args:
        preset: `last_number`, `choice_letter`, `after_marker` or `whole`.
        compare: how answers are compared; None for what suits the preset.
        marker: of `after_marker`.

    Raises:
        ConfigError: for a name that is none of these.
    """
    if preset == "after_marker":
        return after_marker(marker, compare or "number")
    presets = {"last_number": last_number, "choice_letter": choice_letter, "whole": whole}
    if preset not in presets:
        raise ConfigError("preset", preset, "is not one of the choices", f"choose one of {', '.join(get_args(Preset))}")
    return presets[preset](compare) if compare else presets[preset]()


def normaliser(compare: Comparison) -> Normaliser:
    """What brings answers of a kind into one spelling.

    Raises:
        ConfigError: for a kind that there is not.
    """
    if compare not in NORMALISERS:
        raise ConfigError("compare", compare, "is not one of the choices", f"choose one of {', '.join(NORMALISERS)}")
    return NORMALISERS[compare]
