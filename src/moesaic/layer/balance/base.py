"""What every balance loss is: a config that maps a layer's record to one value for each sequence."""

from __future__ import annotations

from abc import abstractmethod

from pydantic import NonNegativeFloat
from torch import Tensor

from moesaic.configuration import Config
from moesaic.layer.record import Routing, RoutingContext


class BalanceLoss(Config):
    """A loss on the routing of one MoE layer.

    It is reported for each sequence and averaged by the caller with the token weights of the language-model loss. So
    its share of the total does not depend on how sequences are spread over micro-batches, ranks or padding.

    Attributes:
        coefficient: weight of this loss, summed over layers, in the training loss.
    """

    coefficient: NonNegativeFloat

    @property
    def name(self) -> str:
        """Key under which the loss is reported."""
        return self.type  # type: ignore[attr-defined]

    @abstractmethod
    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        """Unweighted loss of each sequence, shape (B,); 0 for a sequence of padding only."""
