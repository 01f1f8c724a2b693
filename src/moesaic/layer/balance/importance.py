"""The importance loss: experts shall have equal sums of weights."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moesaic.layer.balance.base import BalanceLoss
from moesaic.layer.balance.sums import Scope, probabilities, squared_variation, sum_over, weights
from moesaic.layer.record import Routing, RoutingContext


class Importance(BalanceLoss):
    """Squared coefficient of variation of the experts' importance, which is the sum of their weights over tokens.

    Source: Shazeer et al. (arXiv 1701.06538, eq. 6-7), with a coefficient of 0.1; V-MoE (arXiv 2106.05974, appendix A)
    sums the scores of all experts instead of the weights of those that were picked, with 0.005 in its code. 0 when
    balanced, at most N - 1. Experts may have equal importance and unequal numbers of tokens; `load` is the remedy.

    Attributes:
        of: sum the "weights" of picks, or the normalised "scores" of all columns.
        scope: tokens over which importance is summed; only "sequence" is independent of accumulation and world size.
            The sources sum over a batch.
    """

    type: Literal["importance"] = "importance"
    of: Literal["weights", "scores"] = "weights"
    scope: Scope = "sequence"

    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        values_TX = weights(routing) if self.of == "weights" else probabilities(routing)
        return squared_variation(sum_over(values_TX, context, self.scope))
