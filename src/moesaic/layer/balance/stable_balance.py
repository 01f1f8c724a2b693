"""The balance loss of StableMoE: tokens of full experts lower their scores, those of empty ones raise them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moesaic.layer.balance.base import BalanceLoss
from moesaic.layer.balance.sums import Scope, frequencies, mean_over, picks
from moesaic.layer.record import Routing, RoutingContext


class StableBalance(BalanceLoss):
    """1 / T * sum_i (n_i - n) / n * (sum over tokens of expert i of sigmoid(logit_i)), with n the mean of the n_i.

    Source: StableMoE (arXiv 2204.08396), which does not divide by the number of tokens T, so that its loss
    grows with the batch. 0 when balanced; a token's share is at most N - 1. Only picks get a gradient.

    Attributes:
        scope: tokens over which n_i and the mean are taken; only "sequence" is independent of accumulation and world
            size. The source takes a batch.
    """

    type: Literal["stable_balance"] = "stable_balance"
    scope: Scope = "sequence"

    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        excess_BM = frequencies(routing, context, self.scope) - 1
        score_BM = mean_over(picks(routing) * routing.logits_TN.sigmoid(), context, self.scope)
        return (excess_BM * score_BM).sum(-1)
