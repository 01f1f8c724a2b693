"""One item of an evaluation task, as a line of a JSONL file holds it."""

from __future__ import annotations

import hashlib
import json
import string
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from moesaic.configuration import Config
from moesaic.errors import ConfigError
from moesaic.infer.consistency.extract import Comparison, Extractor, Preset, by_pattern, by_preset, normaliser

Length = Literal["none", "tokens", "characters", "bytes"]
_COMPARED: dict[Preset, Comparison] = {
    "last_number": "number",
    "choice_letter": "letter",
    "after_marker": "number",
    "whole": "text",
}


class _Item(Config):
    """What all items have.

    Attributes:
        id: name of the item, unique in its file; None for the number of its line among items, from 0.
        prompt: what the model reads.
    """

    id: str | None = None
    prompt: str

    @field_validator("id", mode="before")
    @classmethod
    def _text(cls, value: object) -> object:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @property
    def fingerprint(self) -> str:
        """Digest of all fields but `id`."""
        content = json.dumps(self.model_dump(mode="json", exclude={"id"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class ChoiceItem(_Item):
    """Multiple choice: the choice that the model finds likeliest after the prompt.

    Attributes:
        choices: two or more texts, as they follow the prompt, with the space in front if there is one.
        answer: the right one, by number from 0, by its text, or by its letter from A.
        length: what log-likelihoods are divided by before they are compared: nothing, the number of scored tokens,
            or the characters or UTF-8 bytes of the choice (`acc_norm` of lm-evaluation-harness divides by characters).
    """

    type: Literal["choice"] = "choice"
    choices: tuple[str, ...] = Field(min_length=2)
    answer: int | str
    length: Length = "none"

    @model_validator(mode="after")
    def _check(self) -> Self:
        for number, choice in enumerate(self.choices):
            if not choice:
                raise ConfigError(f"choices.{number}", choice, "is empty", "write what follows the prompt")
            if choice in self.choices[:number]:
                raise ConfigError(f"choices.{number}", choice, "stands there twice", "make choices differ")
        _ = self.right
        return self

    @property
    def right(self) -> int:
        """Number of the right choice, from 0."""
        count = len(self.choices)
        if isinstance(self.answer, str):
            if self.answer in self.choices:
                return self.choices.index(self.answer)
            stripped = [choice.strip() for choice in self.choices]
            if stripped.count(self.answer.strip()) == 1:
                return stripped.index(self.answer.strip())
            letter = string.ascii_uppercase.find(self.answer.strip()) if len(self.answer.strip()) == 1 else -1
            if 0 <= letter < count:
                return letter
        elif 0 <= self.answer < count:
            return self.answer
        last = string.ascii_uppercase[min(count, 26) - 1]
        raise ConfigError(
            "answer", self.answer, "is none of the choices", f"give 0 to {count - 1}, A to {last}, or the text of one"
        )


class GenerateItem(_Item):
    """A text is generated, and the answer in it compared with the right one.

    Attributes:
        answer: the right answer; or several, each of them right.
        pattern: regular expression with one group, or one named `answer`, that finds the answer; the last match counts.
        preset: a usual rule instead: `last_number`, `choice_letter`, `after_marker`, or `whole` text.
        marker: what `after_marker` looks for.
        compare: how answers are compared: as `number`, `text` (without case and spacing), `letter` or `exact`. None
            for what suits the preset; `text` for a pattern.
        stop: texts that end the generation.
        max_new_tokens: most tokens to generate.
    """

    type: Literal["generate"] = "generate"
    answer: str | int | float | tuple[str | int | float, ...]
    pattern: str | None = None
    preset: Preset | None = None
    marker: str = Field(default="####", min_length=1)
    compare: Comparison | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: int = Field(default=256, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.pattern is None) == (self.preset is None):
            problem = "is missing" if self.pattern is None else "and preset are both given"
            raise ConfigError("pattern", self.pattern, problem, "give one of pattern and preset")
        for number, text in enumerate(self.stop):
            if not text:
                raise ConfigError(f"stop.{number}", text, "is empty", "leave it out")
        _ = self.extractor, self.right
        return self

    @property
    def compared_as(self) -> Comparison:
        """How answers are compared."""
        return self.compare or (_COMPARED[self.preset] if self.preset else "text")

    @property
    def extractor(self) -> Extractor:
        """What finds the answer in a text."""
        if self.pattern is not None:
            return by_pattern(self.pattern, self.compared_as)
        assert self.preset is not None, "checked when the item was made"
        return by_preset(self.preset, self.compared_as, marker=self.marker)

    @property
    def right(self) -> frozenset[str]:
        """The right answers in the spelling that extracted ones have."""
        answers = self.answer if isinstance(self.answer, tuple) else (self.answer,)
        found = {answer: normaliser(self.compared_as)(str(answer)) for answer in answers}
        for answer, spelling in found.items():
            if spelling is None:
                raise ConfigError(
                    "answer", answer, f"can't be compared as {self.compared_as}", "correct it, or set another `compare`"
                )
        if not found:
            raise ConfigError("answer", self.answer, "is empty", "give the right answer")
        return frozenset(spelling for spelling in found.values() if spelling is not None)


Item = ChoiceItem | GenerateItem
