"""The coefficients of a model's balance losses at this point of its training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moesaic.layer.balance.base import BalanceLoss
from moesaic.layer.schedule import Schedule, value_at


class Coefficients:
    """Answers with the coefficient of a loss in a layer: a constant, or what its schedule or its layer's state says.

    Args:
        losses: the losses.
        adaptive: the adaptive coefficients of a layer by the name of the loss.
    """

    def __init__(self, losses: Sequence[BalanceLoss], adaptive: Callable[[int], Mapping[str, Tensor]]) -> None:
        self._scheduled = {loss.name: loss.coefficient for loss in losses if isinstance(loss.coefficient, Schedule)}
        self._adaptive = adaptive
        self.set_progress(0.0)

    @property
    def scheduled(self) -> bool:
        """Whether any follows a schedule."""
        return bool(self._scheduled)

    def set_progress(self, progress: float) -> None:
        """Move schedules to this share of the training."""
        # Tensors, because a compiled model would be compiled again for each new number. A model may be made on meta.
        self._values = {
            name: torch.tensor(value_at(schedule, progress), dtype=torch.float64, device="cpu")
            for name, schedule in self._scheduled.items()
        }

    def __call__(self, loss: BalanceLoss, layer: int) -> float | Tensor:
        if loss.adaptive is not None:
            return self._adaptive(layer)[loss.name]
        value = self._values.get(loss.name)
        return value_at(loss.coefficient, 0.0) if value is None else value
