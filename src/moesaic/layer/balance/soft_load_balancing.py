"""Load balancing with weights in the place of counts, which makes both factors differentiable."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moesaic.layer.balance.base import BalanceLoss
from moesaic.layer.balance.sums import Scope, mean_over, probabilities, weights
from moesaic.layer.record import Routing, RoutingContext


class SoftLoadBalancing(BalanceLoss):
    """N sum_i u_i P_i, with u_i = the mean weight of expert i and P_i its mean normalised score.

    Source: Branch-Train-MiX (arXiv 2403.07816). Uniform routing gives the sum of a token's weights: 1 where
    they are renormalised, as there. Gradient flows through both factors.

    Attributes:
        scope: tokens over which the means are taken; only "sequence" is independent of accumulation and world size.
    """

    type: Literal["soft_load_balancing"] = "soft_load_balancing"
    scope: Scope = "sequence"

    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        u_BN = mean_over(weights(routing), context, self.scope)
        p_BN = mean_over(probabilities(routing)[:, : routing.num_experts], context, self.scope)
        return routing.num_experts * (u_BN * p_BN).sum(-1)
