"""What training sequences ask the model to predict, as configuration: the `data.objective` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moesaic.configuration import Config
from moesaic.errors import ConfigError


class CausalLM(Config):
    """Every token from those before it."""

    type: Literal["causal_lm"] = "causal_lm"


class SpanCorruption(Config):
    """Spans of a text, each replaced by a sentinel, are to be said (T5, arXiv 1910.10683, section 3.1.4).

    Of L tokens round(L noise_density) are noise, in round(noise / mean_span) spans of random lengths. The model reads what
    is left, a sentinel in the place of each span, and the end of text; it predicts each sentinel with its span, and the end
    of text. L is as large as fits.

    Attributes:
        share: of this denoiser in the sequences, in any unit.
        mean_span: mean length of a span, mu.
        noise_density: share of the tokens that are noise, r.
        mode: name of the token that stands in front, "[NLU]" for example; None for none.
    """

    kind: Literal["span_corruption"] = "span_corruption"
    share: PositiveFloat
    mean_span: float = Field(ge=1)
    noise_density: float = Field(gt=0, lt=1)
    mode: str | None = Field(default=None, min_length=1)


class PrefixLM(Config):
    """A text in two, at a place that is uniformly random: the second part is predicted from the first and from itself.

    Half of the text is predicted in the mean, which is r = 0.5.

    Attributes:
        share: of this denoiser in the sequences, in any unit.
        mode: name of the token that stands in front; None for none.
    """

    kind: Literal["prefix_lm"] = "prefix_lm"
    share: PositiveFloat
    mode: str | None = Field(default=None, min_length=1)


Denoiser = Annotated[SpanCorruption | PrefixLM, Field(discriminator="kind")]

NLU, NLG, S2S = "[NLU]", "[NLG]", "[S2S]"
MODES = (NLU, NLG, S2S)

# OpenMoE (arXiv 2402.01739), table 2.
OPENMOE: tuple[SpanCorruption | PrefixLM, ...] = (
    SpanCorruption(share=0.1, mean_span=3, noise_density=0.15, mode=NLU),
    SpanCorruption(share=0.1, mean_span=8, noise_density=0.15, mode=NLU),
    SpanCorruption(share=0.1, mean_span=3, noise_density=0.5, mode=NLG),
    SpanCorruption(share=0.1, mean_span=8, noise_density=0.5, mode=NLG),
    SpanCorruption(share=0.1, mean_span=64, noise_density=0.5, mode=NLG),
    PrefixLM(share=0.5, mode=S2S),
)


class UL2(Config):
    """A mixture of denoisers (UL2, arXiv 2205.05131), for a decoder: what is read and what is predicted in one sequence.

    Attention is causal throughout, and only what is to be predicted counts in the loss.

    Attributes:
        denoisers: which, and how often each; the default is OpenMoE's table.
        sentinel: name of the sentinels in the tokenizer, with {} for a number from 0.
        reserved_from: first of a block of ids that the tokenizer does not use, for the modes in the order in which
            denoisers name them, then for sentinels. None looks for their names in the tokenizer.
    """

    type: Literal["ul2"] = "ul2"
    denoisers: tuple[Denoiser, ...] = Field(default=OPENMOE, min_length=1)
    sentinel: str = "<extra_id_{}>"
    reserved_from: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _consistent(self) -> UL2:
        if self.sentinel.count("{}") != 1:
            raise ConfigError("sentinel", self.sentinel, "has not one {} for the number", "write <extra_id_{}>")
        return self

    @property
    def modes(self) -> tuple[str, ...]:
        """Names of the mode tokens, each once."""
        return tuple(dict.fromkeys(found.mode for found in self.denoisers if found.mode is not None))


Plain = Annotated[CausalLM | UL2, Field(discriminator="type")]


class ObjectivePart(Config):
    """One objective of several, and its share of the sequences, in any unit."""

    share: PositiveFloat
    objective: Plain


class MixedObjective(Config):
    """Several objectives in every batch.

    Attributes:
        parts: which, and how often each.
    """

    type: Literal["mixed"] = "mixed"
    parts: tuple[ObjectivePart, ...] = Field(min_length=2)


class Stage(Config):
    """Part of the training with one objective.

    Attributes:
        objective: of this part.
        until: share of the training's steps at which it ends.
        until_step: or the step after which it ends; the last stage has neither.
    """

    objective: Annotated[CausalLM | UL2 | MixedObjective, Field(discriminator="type")]
    until: float | None = Field(default=None, gt=0, lt=1)
    until_step: PositiveInt | None = None


class StagedObjective(Config):
    """One objective after the other.

    Attributes:
        stages: in their order; all but the last have `until`, or all but the last have `until_step`.
    """

    type: Literal["stages"] = "stages"
    stages: tuple[Stage, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _rising(self) -> StagedObjective:
        *earlier, last = self.stages
        for field in ("until", "until_step"):
            if getattr(last, field) is not None:
                where = f"stages.{len(earlier)}.{field}"
                raise ConfigError(where, getattr(last, field), "leaves the rest open", "remove it from the last stage")
        field = "until" if earlier[0].until is not None else "until_step"
        before = 0.0
        for number, stage in enumerate(earlier):
            end, other = getattr(stage, field), {"until": "until_step", "until_step": "until"}[field]
            if end is None or getattr(stage, other) is not None:
                raise ConfigError(
                    f"stages.{number}", stage.to_dict(), "ends in another way than the first", f"give {field} alone"
                )
            if end <= before:
                raise ConfigError(
                    f"stages.{number}.{field}", end, "is not after the stage before it", "write rising numbers"
                )
            before = end
        return self

    def at(self, step: int, steps: int) -> CausalLM | UL2 | MixedObjective:
        """The objective of a step.

        Args:
            step: optimiser steps already made.
            steps: of the whole run.
        """
        for stage in self.stages[:-1]:
            if step < (stage.until_step if stage.until_step is not None else (stage.until or 0.0) * steps):
                return stage.objective
        return self.stages[-1].objective


ObjectiveConfig = Annotated[CausalLM | UL2 | MixedObjective | StagedObjective, Field(discriminator="type")]


def ul2_of(objective: CausalLM | UL2 | MixedObjective | StagedObjective) -> dict[str, UL2]:
    """Every UL2 mixture in an objective, by the path of its field."""
    match objective:
        case UL2():
            return {"": objective}
        case MixedObjective():
            inner = {f"parts.{index}.objective": part.objective for index, part in enumerate(objective.parts)}
        case StagedObjective():
            inner = {f"stages.{index}.objective": stage.objective for index, stage in enumerate(objective.stages)}
        case _:
            inner = {}
    return {
        f"{path}.{below}".rstrip("."): found for path, part in inner.items() for below, found in ul2_of(part).items()
    }
