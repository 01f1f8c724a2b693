"""Learning-rate schedules: the factor on the peak learning rate as a function of the step, a class each."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from moesaic.configuration import Config
from moesaic.errors import ConfigError


class WarmUp(Config):
    """What all schedules begin with: a linear rise from peak / warmup_steps to the peak.

    Attributes:
        warmup_steps: length of the rise; None for a twentieth of the run.
    """

    warmup_steps: NonNegativeInt | None = None

    def factor(self, step: int, steps: int) -> float:
        """Factor on the peak learning rate, in (0, 1].

        Args:
            step: optimiser steps already made, 0 <= step < steps.
            steps: optimiser steps of the whole run.
        """
        warmup = self.warmup(steps)
        if step < warmup:
            return (step + 1) / warmup
        return self.after_warmup(step - warmup, steps - warmup)

    def warmup(self, steps: int) -> int:
        """Length of the rise in a run of `steps`.

        Raises:
            ConfigError: if it leaves nothing of the run.
        """
        warmup = steps // 20 if self.warmup_steps is None else self.warmup_steps
        if warmup >= steps:
            raise ConfigError(
                "warmup_steps", warmup, f"does not end before the run of {steps} steps", f"choose 0 to {steps - 1}"
            )
        return warmup

    @abstractmethod
    def after_warmup(self, step: int, steps: int) -> float:
        """The factor with steps counted from the end of the rise."""


class ConstantSchedule(WarmUp):
    """The peak learning rate to the end."""

    type: Literal["constant"] = "constant"

    def after_warmup(self, step: int, steps: int) -> float:
        return 1.0


class CosineSchedule(WarmUp):
    """Half a cosine from the peak to `min_lr_ratio`, which would be reached at step `steps` (arXiv 1608.03983, eq. 5).

    Attributes:
        min_lr_ratio: final learning rate as a share of the peak.
    """

    type: Literal["cosine"] = "cosine"
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)

    def after_warmup(self, step: int, steps: int) -> float:
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * (1 + math.cos(math.pi * step / steps)) / 2


class WSDSchedule(WarmUp):
    """Warm-up, stable, decay: constant, then a fall over the last part of the run (MiniCPM, arXiv 2404.06395).

    Attributes:
        decay_fraction: share of the run that decays.
        decay: shape of the fall; "sqrt" is 1 - sqrt(progress), which ends lower than "linear" in arXiv 2405.18392.
        min_lr_ratio: learning rate that the fall would reach at step `steps`, as a share of the peak.
    """

    type: Literal["wsd"] = "wsd"
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    decay: Literal["sqrt", "linear"] = "sqrt"
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)

    def factor(self, step: int, steps: int) -> float:
        # The fall is measured on the whole run, so that a longer warm-up does not move it.
        decay_steps = max(1, round(self.decay_fraction * steps))
        progress = max(0.0, (step - (steps - decay_steps)) / decay_steps)
        fallen = math.sqrt(progress) if self.decay == "sqrt" else progress
        return super().factor(step, steps) * (1 - (1 - self.min_lr_ratio) * fallen)

    def after_warmup(self, step: int, steps: int) -> float:
        return 1.0


class StepSchedule(WarmUp):
    """Constant, multiplied by `factor` at each of some points of the run (DeepSeekMoE, arXiv 2401.06066, section 4.1.2).

    Attributes:
        at: shares of the whole run, rising.
        by: what the learning rate is multiplied with at each.
    """

    type: Literal["steps"] = "steps"
    at: tuple[float, ...] = (0.8, 0.9)
    by: float = Field(default=0.316, gt=0, le=1)

    @model_validator(mode="after")
    def _rising(self) -> StepSchedule:
        if any(not 0 < share < 1 for share in self.at) or list(self.at) != sorted(set(self.at)):
            raise ConfigError("at", self.at, "are not rising shares of the run", "write them as [0.8, 0.9]")
        return self

    def factor(self, step: int, steps: int) -> float:
        return super().factor(step, steps) * self.by ** sum(step >= share * steps for share in self.at)

    def after_warmup(self, step: int, steps: int) -> float:
        return 1.0


class InverseSquareRootSchedule(WarmUp):
    """The peak for `plateau_steps`, then peak * sqrt(plateau_steps / step), whatever the length of the run (T5, OpenMoE).

    Both take a peak of 0.01 and 10,000 steps without a rise before, which is 1 / sqrt(max(step, 10000)) (arXiv 1910.10683,
    section 3.1.2), with Adafactor.

    Attributes:
        plateau_steps: steps at the peak, the rise included.
    """

    type: Literal["inverse_sqrt"] = "inverse_sqrt"
    plateau_steps: PositiveInt = 10_000

    def factor(self, step: int, steps: int) -> float:
        return super().factor(step, steps) * math.sqrt(self.plateau_steps / max(step + 1, self.plateau_steps))

    def after_warmup(self, step: int, steps: int) -> float:
        return 1.0


Schedule = Annotated[
    CosineSchedule | WSDSchedule | StepSchedule | InverseSquareRootSchedule | ConstantSchedule,
    Field(discriminator="type"),
]
