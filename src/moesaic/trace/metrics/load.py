"""Load of the experts of a layer and how evenly it is spread. `max_violation` and `routing_entropy` are `layer.balance`'s.

Throughout the package, index_TK holds picked experts, and a pick equal to N is no expert and is never counted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moesaic.layer import max_violation, routing_entropy
from moesaic.trace.counts.routing import LayerCounts
from moesaic.trace.metrics.bootstrap import band_of, block_weights
from moesaic.trace.metrics.result import MetricResult


def experts_per_token(index_TK: Tensor, num_experts: int) -> Tensor:
    """Number of experts that each token ran, int64 (T,): its picks that are an expert."""
    return (index_TK < num_experts).sum(-1)


def load_shares(load_N: Tensor) -> Tensor:
    """f_i = n_i / sum_j n_j, float64 (N,): 1 / N everywhere when balanced; zeros if there was no pick."""
    return load_N.to(torch.float64) / load_N.sum().clamp(min=1)


def relative_load(load_N: Tensor) -> Tensor:
    """N f_i = n_i / mean_j n_j, float64 (N,): 1 when balanced, 0 for an unused expert, its maximum is MaxVio + 1."""
    return load_shares(load_N) * load_N.numel()


def null_share(chosen_M: Tensor, num_experts: int) -> float:
    """Share of the selections that went to null experts, the columns from `num_experts` on; 0 without a selection.

    Balanced picks of N experts and m nulls give m / (N + m).
    """
    return float(chosen_M[num_experts:].sum() / chosen_M.sum().clamp(min=1))


def gini(load_N: Tensor) -> float:
    """Gini coefficient of a load: 0 when balanced, 1 - 1 / N when one expert takes all, NaN without a pick.

    G = sum_ij |n_i - n_j| / (2 N sum_j n_j).
    """
    return float(_gini(load_N.to(torch.float64).unsqueeze(0))[0])


def load_balance(counts: LayerCounts, *, first: bool = False, replicates: int = 200) -> MetricResult:
    """How evenly the experts of a layer are chosen, before drops; null experts are left out.

    With n_i the picks of expert i and T tokens, the table holds for each expert its picks ("count"), the share of the
    tokens that chose it m_i = n_i / T ("value"; the sum over experts is K), f_i = n_i / sum_j n_j ("share") and N f_i
    ("relative"). The value is MaxVio = max_i N f_i - 1 (arXiv 2408.15664, eq. 4): 0 when balanced, N / K - 1 when all
    tokens choose the same K experts. `values` has the entropy of f over log N, the Gini coefficient, the experts that
    nobody chose ("unused") and the share of all selections that were null experts ("null_share").

    Args:
        counts: of the layer.
        first: count first choices only; K is then 1.
        replicates: bootstrap draws for the band.
    """
    chosen_M = counts.first_M if first else counts.chosen_M
    load_N = chosen_M[: counts.num_experts]
    some = int(load_N.sum()) > 0
    band = None
    if some and "block" in counts.groups:
        table_BN = counts.group("block").table_GM(first=first)[:, : counts.num_experts].to(torch.float64)
        weight_RB = block_weights(len(table_BN), replicates)
        if weight_RB is not None:
            load_RN = weight_RB @ table_BN
            band = band_of(load_RN.amax(-1) / load_RN.mean(-1) - 1)
    return MetricResult(
        metric="load",
        layer=counts.layer,
        value=float(max_violation(load_N)) if some else math.nan,
        top_k=1 if first else counts.top_k,
        num_columns=counts.num_columns,
        reference=0.0,
        values={
            "entropy": float(routing_entropy(load_N)) if some else math.nan,
            "gini": gini(load_N),
            "unused": float((load_N == 0).sum()),
            "null_share": null_share(chosen_M, counts.num_experts),
        },
        table={
            "label": torch.arange(counts.num_experts),
            "count": load_N,
            "value": load_N.to(torch.float64) / (counts.tokens or math.nan),
            "share": load_shares(load_N),
            "relative": relative_load(load_N),
        },
        band=band,
        conventions={"drops": "before", "ranks": "first" if first else "all"},
    )


def _gini(load_RN: Tensor) -> Tensor:
    sorted_RN = load_RN.sort(-1).values
    size = load_RN.shape[-1]
    rank_N = torch.arange(1, size + 1, dtype=load_RN.dtype)
    return 2 * (sorted_RN * rank_N).sum(-1) / (size * load_RN.sum(-1)) - (size + 1) / size
