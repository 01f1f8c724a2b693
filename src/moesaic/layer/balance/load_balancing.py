"""The load-balancing loss of Switch Transformer and DeepSeekMoE, on the assignments that were really made."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moesaic.layer.balance.base import BalanceLoss
from moesaic.layer.balance.sums import Counts, Scope, frequencies, mean_over, probabilities
from moesaic.layer.record import Routing, RoutingContext


class LoadBalancing(BalanceLoss):
    """sum_i f_i P_i, with f_i = N / (K T) * (picks of expert i) and P_i = the mean normalised score of expert i.

    Source: Switch Transformer (arXiv 2101.03961, eq. 4-6) for K = 1; DeepSeekMoE (arXiv 2401.06066, eq. 12-14) for
    any K; DeepSeek-V3 (arXiv 2412.19437, eq. 17-20) for scores that are not softmax, which are normalised to sum to 1
    over all experts. Uniform routing gives 1, collapse onto one set of K experts up to N / K. Gradient flows through P
    only. Picks of no expert are not counted. Where tokens have different numbers of picks, K T is the number of all picks.

    Null experts count as experts, N then being the number of all columns, but share one f: the mean of theirs (AdaMoE,
    arXiv 2406.13233, eq. 6). So it does not matter which of them a token picks. AdaMoE's value is K times ours.

    Attributes:
        scope: tokens over which f and P are taken: each "sequence" on its own, which makes the loss exactly independent
            of accumulation and world size, or the whole micro-"batch", a looser demand that does depend on its size.
        counts: picks in f: "all" K of a token, or the "first", the one with its highest score, with f_i = N / T * (first
            picks of i). GShard (arXiv 2006.16668, Algorithm 1) counts first choices before capacity drops any, and
            prints the mean over experts of share times P, which is 1 / N^2 of this; implementations multiply by N^2.
            Second choices then have no part in f, and may be as unbalanced as they like.
        pool_nulls: give null experts one common f; otherwise they are balanced among each other, too, which AdaMoE
            finds worse (table 3).
    """

    type: Literal["load_balancing"] = "load_balancing"
    scope: Scope = "sequence"
    counts: Counts = "all"
    pool_nulls: bool = True

    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        f_BM = frequencies(routing, context, self.scope, self.counts)
        if self.pool_nulls and routing.num_null:
            experts_BN, nulls_BN = f_BM.split([routing.num_experts, routing.num_null], dim=-1)
            f_BM = torch.cat([experts_BN, nulls_BN.mean(-1, keepdim=True).expand_as(nulls_BN)], dim=-1)
        return (f_BM * mean_over(probabilities(routing), context, self.scope)).sum(-1)
