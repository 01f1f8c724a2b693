"""How far groups of tokens route from uniform and from the average: OpenMoE's routing-decision standard deviation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moesaic.trace.counts.groups import GroupCounts
from moesaic.trace.counts.routing import LayerCounts
from moesaic.trace.metrics.result import MetricResult, mean


def noise_floor(tokens_G: Tensor, top_k: float | Tensor, num_columns: int) -> Tensor:
    """The deviation s that uniform top-K of M columns without replacement has over so many tokens, float64.

    sqrt((K / M) (1 - K / M) / (K^2 m)) for m tokens; 0.0107 for m = 128, K = 2, M = 32. NaN without a token.
    """
    tokens_G = tokens_G.to(torch.float64)
    share = torch.as_tensor(top_k, dtype=torch.float64) / num_columns
    return (share * (1 - share) / (top_k**2 * tokens_G.where(tokens_G > 0, math.nan))).clamp(min=0).sqrt()


def deviation_bound(top_k: float, num_columns: int) -> float:
    """The largest s: sqrt(1 / (K M) - 1 / M^2), where a group always chooses the same K columns."""
    return math.sqrt(max(1 / (top_k * num_columns) - 1 / num_columns**2, 0.0))


def routing_deviation(
    counts: LayerCounts, group: str = "token", *, first: bool = False, min_count: int = 1
) -> MetricResult:
    """The routing-decision standard deviation of each group (OpenMoE, arXiv 2402.01739, appendix E, figures 13 and 14).

    With f_g(e) the share of column e among the selections of group g (sum over e is 1), s_g is the population standard
    deviation (ddof 0) of the M entries of f_g: 0 where the group chooses uniformly, `deviation_bound` where it always
    chooses the same K columns. Nulls are columns like the experts.

    Two traps. Few tokens look specialised: compare with the "floor" of a uniform router (`noise_floor`). And s measures
    the distance to *uniform*: an unbalanced router has a high s for every grouping, so read "relative" beside it,
    s_rel = sqrt(mean_e (f_g(e) - f_all(e))^2), which is 0 for a group that routes like the average.

    The table holds for each group its tokens ("count"), s ("value"), "floor" and "relative". The value is the mean of s
    over groups, the reference the mean of their floors. `values`: "weighted" (mean of s by tokens), "relative" (mean of
    s_rel), "excess" = sqrt(max(0, mean s^2 - mean floor^2)), "bound", and "all", the s of all tokens together.

    Args:
        counts: of the layer.
        group: "token" (context-independent specialisation), "position", "domain", "turn", "modality"; "previous" for
            the token before it (its context), "next" and "predicted" for what comes.
        first: first choices only; K is then 1.
        min_count: leave out groups of fewer tokens. OpenMoE takes ids with more than 128 uses.
    """
    whole = counts.group(group)
    table = whole.at_least(min_count)
    columns = table.num_columns
    share_P, picks_G = shares(table, first=first)
    all_M = _all_share(counts, whole, first)
    empty_G = table.tokens_G.new_zeros(len(table), dtype=torch.float64)
    used_G = empty_G.index_add(0, table.group_P, (share_P > 0).to(torch.float64))
    present_P = share_P > 0
    squares_P = torch.where(present_P, (share_P - 1 / columns) ** 2, 0.0)
    s_G = (empty_G.index_add(0, table.group_P, squares_P) + (columns - used_G) / columns**2) / columns
    away_P = (share_P - all_M[table.column_P]) ** 2 - all_M[table.column_P] ** 2
    relative_G = ((empty_G.index_add(0, table.group_P, away_P) + (all_M**2).sum()) / columns).clamp(min=0)
    nothing_G = picks_G == 0
    s_G, relative_G = (values.sqrt().masked_fill(nothing_G, math.nan) for values in (s_G, relative_G))
    floor_G = noise_floor(table.tokens_G, picks_G / table.tokens_G, columns).masked_fill(nothing_G, math.nan)
    top_k = 1 if first else counts.top_k
    return MetricResult(
        metric=f"routing_deviation_{group}",
        layer=counts.layer,
        value=mean(s_G),
        top_k=top_k,
        num_columns=columns,
        reference=mean(floor_G),
        values={
            "weighted": mean(s_G, table.tokens_G),
            "relative": mean(relative_G),
            "excess": math.sqrt(max(mean(s_G**2) - mean(floor_G**2), 0.0)) if not nothing_G.all() else math.nan,
            "bound": deviation_bound(top_k, columns),
            "all": float((all_M - 1 / columns).square().mean().sqrt()),
            "groups": float((~nothing_G).sum()),
        },
        table={
            "label": table.label_G,
            "count": table.tokens_G,
            "value": s_G,
            "floor": floor_G,
            "relative": relative_G,
        },
        min_count=min_count,
        conventions={
            "ddof": 0,
            "ranks": "first" if first else "all",
            "width": table.width,
            "forgotten_tokens": table.forgotten,
        },
    )


def group_distribution(counts: LayerCounts, group: str, *, first: bool = False, min_count: int = 1) -> MetricResult:
    """f_g(e) of every group as a matrix (OpenMoE, arXiv 2402.01739, figures 5, 9 and 10, which draw it as radar charts).

    f_g(e) = selections of e by g / selections of g; each row sums to 1, and is NaN for a group without a selection. The
    value is the mean over groups of their largest entry, the reference that of uniform routing, 1 / M.

    Args:
        counts: of the layer.
        group: the grouping; for token ids the matrix is as long as the vocabulary of the text.
        first: first choices only.
        min_count: leave out groups of fewer tokens.
    """
    table = counts.group(group).at_least(min_count)
    share_P, picks_G = shares(table, first=first)
    matrix_GM = torch.zeros(len(table), table.num_columns, dtype=torch.float64)
    matrix_GM[table.group_P, table.column_P] = share_P
    matrix_GM[picks_G == 0] = math.nan
    most_G = matrix_GM.amax(-1) if len(table) else torch.empty(0, dtype=torch.float64)
    return MetricResult(
        metric=f"distribution_{group}",
        layer=counts.layer,
        value=mean(most_G),
        top_k=1 if first else counts.top_k,
        num_columns=table.num_columns,
        reference=1 / table.num_columns,
        table={"label": table.label_G, "count": table.tokens_G, "value": most_G},
        matrix_GM=matrix_GM,
        min_count=min_count,
        conventions={"ranks": "first" if first else "all", "width": table.width},
    )


def shares(table: GroupCounts, *, first: bool = False) -> tuple[Tensor, Tensor]:
    """f_g(e) of the pairs of a table, float64 (P,), and the selections of each group, float64 (G,)."""
    counts_P = (table.first_P if first else table.chosen_P).to(torch.float64)
    picks_G = table.picks_G(first=first).to(torch.float64)
    return counts_P / picks_G[table.group_P].clamp(min=1), picks_G


def _all_share(counts: LayerCounts, whole: GroupCounts, first: bool) -> Tensor:
    """f_all: of the groups' tokens, or of all where some were forgotten."""
    load_M = (counts.first_M if first else counts.chosen_M) if whole.forgotten else whole.load_M(first=first)
    return load_M.to(torch.float64) / load_M.sum().clamp(min=1)
