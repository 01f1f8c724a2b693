"""How much of the routing a grouping explains: normalised mutual information, beside what shuffled labels would give."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moesaic.trace.counts.groups import GroupCounts
from moesaic.trace.counts.routing import LayerCounts
from moesaic.trace.metrics.deviation import shares
from moesaic.trace.metrics.result import MetricResult

_MANY = 32.0
"""Where a column is expected more often in a group, the entropy is expanded to second order, within 1 % of its bias."""


def group_information(
    counts: LayerCounts, group: str = "token", *, first: bool = False, min_count: int = 1
) -> MetricResult:
    """NMI(group) = 1 - sum_g w_g H(f_g) / H(f_all), with w_g the share of the tokens that are in group g.

    f_g is the distribution of a group's selections over the M columns, H its entropy in nats. 0: the groups route alike.
    1: the group decides the first choice (`first=True`), as for token ids in hash routing; with K selections a group
    that always makes the same ones has H = log K, so 1 is out of reach.

    The reference is the mean over all permutations of the labels: finite groups always look a little alike, the more the
    smaller they are. It is computed, not sampled: under a permutation the tokens of a group of m that choose column e
    are hypergeometric, so E[H(f_g)] is a sum over columns: exact where all tokens have K selections and a column is
    expected at most 32 times in the group, to second order above. `values`: "entropy" H(f_all), "conditional" sum_g w_g H(f_g), "excess" NMI - reference, and
    "ratio" NMI / reference. The table holds "count" and H(f_g) ("value").

    Args:
        counts: of the layer.
        group: the grouping, as in `routing_deviation`.
        first: first choices only.
        min_count: leave out groups of fewer tokens, here and in f_all.
    """
    table = counts.group(group).at_least(min_count)
    load_M = table.load_M(first=first).to(torch.float64)
    entropy = float(torch.special.entr(load_M / load_M.sum().clamp(min=1)).sum())
    share_P, _ = shares(table, first=first)
    entropy_G = torch.zeros(len(table), dtype=torch.float64).index_add(0, table.group_P, torch.special.entr(share_P))
    weight_G = table.tokens_G.to(torch.float64) / table.tokens_G.sum().clamp(min=1)
    conditional = float((weight_G * entropy_G).sum())
    defined = entropy > 0
    nmi = 1 - conditional / entropy if defined else math.nan
    permuted = 1 - permuted_entropy(table, first=first) / entropy if defined else math.nan
    return MetricResult(
        metric=f"information_{group}",
        layer=counts.layer,
        value=nmi,
        top_k=1 if first else counts.top_k,
        num_columns=table.num_columns,
        reference=permuted,
        values={
            "entropy": entropy,
            "conditional": conditional,
            "excess": nmi - permuted,
            "ratio": nmi / permuted if permuted and permuted > 1e-12 else math.nan,
        },
        table={"label": table.label_G, "count": table.tokens_G, "value": entropy_G},
        min_count=min_count,
        conventions={
            "ranks": "first" if first else "all",
            "null": "mean over permutations",
            "width": table.width,
            "forgotten_tokens": table.forgotten,
        },
    )


def permuted_entropy(table: GroupCounts, *, first: bool = False) -> float:
    """Mean of sum_g w_g H(f_g) over all permutations of the tokens' labels, in nats.

    Args:
        table: the groups; only their sizes and the load of all count.
        first: first choices only.
    """
    tokens = int(table.tokens_G.sum())
    if not tokens:
        return math.nan
    chosen_M = table.load_M(first=first)
    chosen_M = chosen_M[chosen_M > 0]
    top_k = float(chosen_M.sum()) / tokens
    # Columns that equally many tokens chose are alike.
    load_U, columns_U = chosen_M.unique(return_counts=True)
    size_S, groups_S = table.tokens_G.unique(return_counts=True)
    total = 0.0
    for size, groups in zip(size_S.tolist(), groups_S.tolist(), strict=True):
        terms_U = _expected_entropy(load_U, tokens, size, top_k)
        total += groups * size / tokens * float((terms_U * columns_U).sum())
    return total


def _expected_entropy(load_U: Tensor, tokens: int, size: int, top_k: float) -> Tensor:
    """E[-f log f] with f = c / (K m) and c hypergeometric: of m tokens, those that are among the n of the column."""
    load_U = load_U.to(torch.float64).clamp(max=tokens)
    mean_U = size * load_U / tokens
    rest = (tokens - size) / max(tokens - 1, 1)
    variance_U = mean_U * (1 - load_U / tokens) * rest
    picks = top_k * size
    expected_U = torch.special.entr(mean_U / picks) - variance_U / (2 * mean_U * picks)
    few_U = mean_U <= _MANY
    if few_U.any():
        most = int(min(size, float(mean_U[few_U].max() + 12 * variance_U[few_U].max().sqrt()) + 12))
        c_C = torch.arange(most + 1, dtype=torch.float64)
        n_U1 = load_U[few_U].unsqueeze(-1)
        log_UC = _log_choose(n_U1, c_C) + _log_choose(tokens - n_U1, size - c_C) - _log_choose_scalar(tokens, size)
        expected_U[few_U] = (log_UC.exp() * torch.special.entr(c_C / picks)).sum(-1)
    return expected_U


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """log of n over k, -inf where there is no way to choose."""
    possible = (k >= 0) & (k <= n)
    k = k.clamp(min=0).minimum(n)
    return (torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)).masked_fill(~possible, -math.inf)


def _log_choose_scalar(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
