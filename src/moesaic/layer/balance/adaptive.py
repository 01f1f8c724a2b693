"""Coefficients that follow the load of their layer."""

from __future__ import annotations

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from moesaic.configuration import Config
from moesaic.layer.load import LayerLoad


class AdaptiveCoefficient(Config):
    """After each optimiser step, a <- decay * a + (1 - decay) * min(rate * d, maximum), for each layer on its own.

    d is the layer's drop rate in the step: layers that drop tokens get a stronger loss, others a weaker one. The loss's
    `coefficient` is the first a. Source: Skywork-MoE (arXiv 2406.06563), whose values are the defaults.

    Attributes:
        rate: a for a drop rate of 1, were there no maximum.
        maximum: largest a that the drop rate calls for.
        decay: share of the old a.
        capacity_factor: count what exceeds this many times the mean load as dropped, also where nothing is; None for
            the picks that the router really dropped.
    """

    rate: NonNegativeFloat = 0.2
    maximum: NonNegativeFloat = 0.01
    decay: float = Field(default=0.99, ge=0, le=1)
    capacity_factor: PositiveFloat | None = None

    def drop_rate(self, load: LayerLoad) -> Tensor:
        """d, float64 scalar."""
        if self.capacity_factor is None:
            return load.drop_rate
        chosen_N = load.chosen_M[: load.load_N.numel()].to(torch.float64)
        over_N = (chosen_N - self.capacity_factor * chosen_N.mean()).clamp(min=0)
        return over_N.sum() / chosen_N.sum().clamp(min=1)

    def next(self, coefficient: Tensor, load: LayerLoad) -> Tensor:
        """a after a step with this load."""
        target = (self.rate * self.drop_rate(load)).clamp(max=self.maximum).to(coefficient)
        return self.decay * coefficient + (1 - self.decay) * target
