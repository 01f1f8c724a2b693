"""A number that moves from one value to another while a model is trained."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, Tag, model_validator

from moesaic.configuration import Config
from moesaic.errors import ConfigError


class Schedule(Config):
    """`start` up to `begin`, then on its way to `end`, which it keeps from `finish` on.

    Progress is the share of the training that is done, so that a schedule means the same in a longer run.

    Attributes:
        start: value at the beginning.
        end: value at the end.
        shape: the way between: "linear"; "cosine", half a cosine; "exponential", the same factor for equal parts of the
            way; "step", at once at `begin`.
        begin: progress where the way begins, 0 to 1.
        finish: progress where it ends; None for the end of the training. A step has none.
    """

    start: float
    end: float
    shape: Literal["linear", "cosine", "exponential", "step"] = "linear"
    begin: float = Field(default=0.0, ge=0, le=1)
    finish: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        if self.shape == "step":
            if self.finish is not None:
                raise ConfigError("finish", self.finish, "does not go with shape: step", "give `begin` alone")
            if self.begin == 0:
                raise ConfigError("begin", 0.0, "leaves nothing of `start` in a step", "choose more than 0, up to 1")
        elif self.begin >= (1.0 if self.finish is None else self.finish):
            raise ConfigError("begin", self.begin, "is not before finish", "choose a smaller one")
        if self.shape == "exponential":
            for name in ("start", "end"):
                if getattr(self, name) <= 0:
                    raise ConfigError(name, getattr(self, name), "can't be the end of an exponential", "choose above 0")
        return self

    def at(self, progress: float) -> float:
        """The value when this share of the training is done."""
        if self.shape == "step":
            return self.start if progress < self.begin else self.end
        finish = 1.0 if self.finish is None else self.finish
        done = min(1.0, max(0.0, (progress - self.begin) / (finish - self.begin)))
        if done in (0.0, 1.0):
            return self.end if done else self.start
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** done
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


class NonNegativeSchedule(Schedule):
    """A `Schedule` of values that are not negative."""

    start: NonNegativeFloat
    end: NonNegativeFloat


def _kind(value: Any) -> str:
    return "<schedule>" if isinstance(value, dict | Schedule) else "<number>"


# A field that takes a number or a schedule of numbers, none of them negative.
Scheduled = Annotated[
    Annotated[NonNegativeFloat, Tag("<number>")] | Annotated[NonNegativeSchedule, Tag("<schedule>")],
    Discriminator(_kind),
]


def value_at(value: float | Schedule, progress: float) -> float:
    """A `Scheduled` field's value when this share of the training is done."""
    return value.at(progress) if isinstance(value, Schedule) else value
