"""Which experts are chosen together, in one layer and from one MoE layer to the next."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.trace.counts.routing import LayerCounts, RoutingCounts
from moesaic.trace.metrics.result import MetricResult, mean


def coactivation_counts(index_TK: Tensor, num_experts: int) -> Tensor:
    """n_ij = number of tokens that picked both i and j, int64 (N, N), symmetric; the diagonal is n_i.

    The experts of a token must differ, as top-k routers guarantee.
    """
    size = num_experts + 1
    counts = torch.zeros(size * size, dtype=torch.int64)
    # One pair of columns at a time: all K * K pairs of all tokens at once would need K times the memory of the trace.
    for first in index_TK.unbind(-1):
        for second in index_TK.unbind(-1):
            counts += torch.bincount(first * size + second, minlength=size * size)
    return counts.view(size, size)[:num_experts, :num_experts]


def coactivation(index_TK: Tensor, num_experts: int) -> Tensor:
    """C_ij = n_ij / n_i for i != j, 0 on the diagonal, NaN in rows of experts that nobody picked, float64 (N, N).

    Row i reads: of the tokens that picked expert i, the share that also picked j. With K picks for every token each row
    of a used expert sums to K - 1; picks made independently and evenly give (K - 1) / (N - 1) in every cell.
    """
    counts_NN = coactivation_counts(index_TK, num_experts)
    load_N1 = counts_NN.diagonal().to(torch.float64).unsqueeze(-1)
    shares_NN = (counts_NN / load_N1.clamp(min=1)).fill_diagonal_(0.0)
    return shares_NN.masked_fill(load_N1 == 0, math.nan)


def coactivation_table(counts: LayerCounts, *, adjacent_only: bool = False) -> MetricResult:
    """C(i -> j) = N_ij / N_i, of the tokens that chose column i the share that also chose j (OLMoE, 2409.02060, eq. 6).

    The matrix has NaN on the diagonal and in rows of columns that nobody chose. With K selections of every token each
    other row sums to K - 1: `values["row_sum_error"]` is the largest deviation, 0 unless tokens have fewer. The value
    is the mean of the rows' largest entries, the reference that of even and independent picks, (K - 1) / (M - 1).

    Args:
        counts: with the table "pairs", or "adjacent".
        adjacent_only: count pairs of neighbouring ranks only, as OLMoE's published code does: it sees K - 1 of the
            K (K - 1) / 2 pairs, so rows do not sum to K - 1.

    Raises:
        ConfigError: if the pairs were not counted.
    """
    name = "adjacent" if adjacent_only else "pairs"
    pairs_MM = counts.adjacent_MM if adjacent_only else counts.pairs_MM
    if pairs_MM is None:
        raise ConfigError("tables", name, "was not counted", f"give count(...) tables that hold {name!r}")
    chosen_M = counts.chosen_M
    load_M = chosen_M.to(torch.float64).masked_fill(chosen_M == 0, math.nan)
    matrix_MM = (pairs_MM / load_M.unsqueeze(-1)).fill_diagonal_(math.nan)
    sums_M = matrix_MM.nansum(-1).masked_fill(load_M.isnan(), math.nan)
    most_M = matrix_MM.nan_to_num(-1.0).amax(-1).masked_fill(load_M.isnan(), math.nan)
    partner_M = matrix_MM.nan_to_num(-1.0).argmax(-1).masked_fill(load_M.isnan(), -1)
    if counts.num_columns < 2:
        most_M, partner_M = torch.full_like(most_M, math.nan), torch.full_like(partner_M, -1)
    error_M = (sums_M - (counts.top_k - 1)).abs()
    known_M = ~error_M.isnan()
    return MetricResult(
        metric="coactivation",
        layer=counts.layer,
        value=mean(most_M) if counts.top_k > 1 else math.nan,
        top_k=counts.top_k,
        num_columns=counts.num_columns,
        reference=(counts.top_k - 1) / max(counts.num_columns - 1, 1),
        values={"row_sum_error": float(error_M[known_M].max()) if known_M.any() else math.nan},
        table={
            "label": torch.arange(counts.num_columns),
            "count": chosen_M,
            "value": most_M,
            "partner": partner_M,
            "row_sum": sums_M,
        },
        matrix_GM=matrix_MM,
        conventions={"adjacent_only": adjacent_only},
    )


def layer_flow(counts: RoutingCounts, first: int, second: int, *, least: float = 1.5) -> MetricResult:
    """Where the first choices of one MoE layer go in the next (OLMoE, arXiv 2409.02060, appendix G).

    The matrix counts tokens by the first choice in layer `first` (rows, the labels of the table) and in layer `second`
    (columns). The value is I(a; b) / H(b), the share of the entropy of the second layer's choice that the first layer's
    explains: 0 where they are independent, 1 where one decides the other.

    Args:
        counts: with the table "flow".
        first: index of a decoder layer.
        second: that of the MoE layer after it.
        least: rows of the table with more than `least` tokens / N are marked 1 in its column "kept", which is what the
            published diagrams draw.

    Raises:
        ConfigError: if the flow between these layers was not counted.
    """
    if (first, second) not in counts.flow:
        known = ", ".join(map(str, counts.flow)) or "none"
        raise ConfigError("second", second, f"has no counted flow from layer {first}", f"counted pairs are: {known}")
    group = counts.flow[first, second]
    matrix_GM = group.table_GM().to(torch.float64)
    total = float(matrix_GM.sum())
    joint_GM = matrix_GM / (total or math.nan)
    row_G, column_M = joint_GM.sum(1), joint_GM.sum(0)
    entropy = float(torch.special.entr(column_M).sum())
    information = float(torch.special.entr(row_G).sum()) + entropy - float(torch.special.entr(joint_GM).sum())
    columns = counts.layer(first).num_columns
    most = matrix_GM.max(-1) if len(group) else None
    return MetricResult(
        metric="flow",
        layer=first,
        value=information / entropy if entropy else math.nan,
        top_k=1,
        num_columns=counts.layer(second).num_columns,
        reference=0.0,
        values={"to_layer": float(second), "tokens": total},
        table={
            "label": group.label_G,
            "count": group.tokens_G,
            "value": torch.empty(0) if most is None else most.values / group.tokens_G,
            "most": torch.empty(0, dtype=torch.int64) if most is None else most.indices,
            "kept": (group.tokens_G > least * total / columns).long(),
        },
        matrix_GM=group.table_GM(),
        conventions={"ranks": "first", "least": least},
    )
