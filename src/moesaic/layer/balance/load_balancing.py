"""The load-balancing loss of Switch Transformer and DeepSeekMoE, on the assignments that were really made."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moesaic.layer.balance.base import BalanceLoss
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
        pool_nulls: give null experts one common f; otherwise they are balanced among each other, too, which AdaMoE
            finds worse (table 3).
    """

    type: Literal["load_balancing"] = "load_balancing"
    scope: Literal["sequence", "batch"] = "sequence"
    pool_nulls: bool = True

    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        counts_BN, scores_BN, tokens_B = _sums(routing, context)
        if self.scope == "batch":
            counts_BN = counts_BN.sum(0, keepdim=True).expand_as(counts_BN)
            scores_BN = scores_BN.sum(0, keepdim=True).expand_as(scores_BN)
            tokens_B = tokens_B.sum().expand_as(tokens_B)
        if self.pool_nulls and routing.num_null:
            experts_BN, nulls_BN = counts_BN.split([routing.num_experts, routing.num_null], dim=-1)
            counts_BN = torch.cat([experts_BN, nulls_BN.mean(-1, keepdim=True).expand_as(nulls_BN)], dim=-1)
        tokens_B1 = tokens_B.clamp(min=1).unsqueeze(-1)
        picks_B1 = counts_BN.sum(-1, keepdim=True).clamp(min=1) if routing.ragged else routing.top_k * tokens_B1
        f_BN = counts_BN * routing.num_columns / picks_B1
        return (f_BN * scores_BN / tokens_B1).sum(-1)


def _sums(routing: Routing, context: RoutingContext) -> tuple[Tensor, Tensor, Tensor]:
    """Picks, normalised scores and real tokens of each sequence: (B, N), (B, N), (B,)."""
    scores_TN = routing.scores_TN
    scores_TN = scores_TN / scores_TN.sum(-1, keepdim=True).clamp(min=torch.finfo(scores_TN.dtype).tiny)
    picks_TK = torch.ones_like(routing.weight_TK, dtype=scores_TN.dtype)
    if context.mask_T is not None:
        mask_T1 = context.mask_T.to(scores_TN.dtype).unsqueeze(-1)
        scores_TN, picks_TK = scores_TN * mask_T1, picks_TK * mask_T1
    batch, columns = context.batch_size, routing.num_columns
    counts_BN = picks_TK.new_zeros(batch, columns + 1)
    counts_BN = counts_BN.scatter_add(1, routing.choice_TK.view(batch, -1), picks_TK.detach().view(batch, -1))
    scores_BN = scores_TN.view(batch, -1, columns).sum(1)
    tokens_B = context.tokens_per_sequence(scores_TN.shape[0], dtype=scores_TN.dtype, device=scores_TN.device)
    return counts_BN[:, :columns], scores_BN, tokens_B
