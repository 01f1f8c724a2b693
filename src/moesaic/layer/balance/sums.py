"""Sums over the tokens of a sequence or of the micro-batch, from which balance losses are made.

The micro-batch is that of all processes of the context's group, so that a loss does not depend on how many there are.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.scores import top_k

Scope = Literal["sequence", "batch"]
Counts = Literal["all", "first"]


def sum_over(values_TX: Tensor, context: RoutingContext, scope: Scope) -> Tensor:
    """Sum over the real tokens of each sequence, (B, X); over all of them, for every sequence, with scope "batch"."""
    if context.mask_T is not None:
        # Not a product: what a padded position holds may be infinite.
        values_TX = values_TX.masked_fill(~context.mask_T.unsqueeze(-1), 0.0)
    sums_BX = values_TX.view(context.batch_size, -1, values_TX.shape[-1]).sum(1)
    if scope == "sequence":
        return sums_BX
    return _over_group(sums_BX.sum(0, keepdim=True), context).expand_as(sums_BX)


def tokens_over(values_TX: Tensor, context: RoutingContext, scope: Scope) -> Tensor:
    """Number of tokens that `sum_over` adds, at least 1, (B, 1)."""
    tokens_B = context.tokens_per_sequence(values_TX.shape[0], dtype=values_TX.dtype, device=values_TX.device)
    if scope == "batch":
        tokens_B = _over_group(tokens_B.sum(), context).expand_as(tokens_B)
    return tokens_B.clamp(min=1).unsqueeze(-1)


def mean_over(values_TX: Tensor, context: RoutingContext, scope: Scope) -> Tensor:
    """Mean over the real tokens, (B, X); 0 without tokens."""
    return sum_over(values_TX, context, scope) / tokens_over(values_TX, context, scope)


def probabilities(routing: Routing) -> Tensor:
    """Scores divided by their sum over all columns, (T, M): DeepSeek-V3 (arXiv 2412.19437, eq. 19)."""
    scores_TM = routing.scores_TN
    return scores_TM / scores_TM.sum(-1, keepdim=True).clamp(min=torch.finfo(scores_TM.dtype).tiny)


def picks(routing: Routing, counts: Counts = "all") -> Tensor:
    """1 where a token picked a column, (T, M), without gradient.

    Args:
        counts: "all" picks, or the "first": the one with the highest score, among equals the lower index.
    """
    choice_TK, columns = routing.choice_TK, routing.num_columns
    if counts == "first":
        choice_TK = choice_TK.sort(-1).values
        scores_TM = routing.scores_TN.detach()
        nothing_T1 = torch.full_like(scores_TM[:, :1], float("-inf"))
        score_TK = torch.cat([scores_TM, nothing_T1], dim=-1).gather(-1, choice_TK)
        choice_TK = choice_TK.gather(-1, top_k(score_TK, 1, stable=True))
    picked_TM = torch.zeros(choice_TK.shape[0], columns + 1, dtype=routing.scores_TN.dtype, device=choice_TK.device)
    return picked_TM.scatter_add(-1, choice_TK, torch.ones_like(choice_TK, dtype=picked_TM.dtype))[:, :columns]


def weights(routing: Routing) -> Tensor:
    """Weight of each expert for each token, 0 where it was not picked, (T, N), with gradient."""
    index_TK, weight_TK = routing.index_TK, routing.weight_TK
    weight_TN = weight_TK.new_zeros(index_TK.shape[0], routing.num_experts + 1)
    return weight_TN.scatter_add(-1, index_TK, weight_TK)[:, : routing.num_experts]


def frequencies(routing: Routing, context: RoutingContext, scope: Scope, counts: Counts = "all") -> Tensor:
    """f_i = M / (K T) * (picks of column i), (B, M): 1 for every column when balanced, without gradient.

    K is 1 when only the first choices count. Where tokens have different numbers of picks, K T is that of all picks.
    """
    picked_TM = picks(routing, counts)
    counts_BM = sum_over(picked_TM, context, scope)
    if routing.ragged and counts == "all":
        total_B1 = counts_BM.sum(-1, keepdim=True).clamp(min=1)
    else:
        total_B1 = (routing.top_k if counts == "all" else 1) * tokens_over(picked_TM, context, scope)
    return counts_BM * routing.num_columns / total_B1


def entropy(probability_X: Tensor) -> Tensor:
    """-sum p log p over the last dimension, in nats; gradients stay finite where p is 0."""
    tiny = torch.finfo(probability_X.dtype).tiny
    return -(probability_X * probability_X.clamp(min=tiny).log()).sum(-1)


def squared_variation(values_BX: Tensor) -> Tensor:
    """Squared coefficient of variation over the last dimension: variance (of a population) over squared mean; 0 at 0."""
    mean_B1 = values_BX.mean(-1, keepdim=True)
    variance_B = (values_BX - mean_B1).square().mean(-1)
    return variance_B / mean_B1.squeeze(-1).square().clamp(min=torch.finfo(values_BX.dtype).tiny)


def _over_group(sums: Tensor, context: RoutingContext) -> Tensor:
    """Sums over the processes of the context's group, differentiable."""
    if context.group is None or dist.get_world_size(context.group) == 1:
        return sums
    return _AllReduce.apply(sums, context.group)


class _AllReduce(torch.autograd.Function):
    """Sum over a group. Every process's loss depends on it, so gradients are summed, too."""

    @staticmethod
    def forward(ctx, sums: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = sums.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
