"""What rare and frequent tokens of the vocabulary use: experts run for them, and the share of null experts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.trace.counts.routing import LayerCounts
from moesaic.trace.metrics.load import experts_per_token, null_share
from moesaic.trace.metrics.result import MetricResult


@dataclass(frozen=True)
class FrequencyBucket:
    """Tokens of the vocabulary that occur about equally often.

    Attributes:
        least: occurrences of the rarest of them.
        most: occurrences of the most frequent of them.
        tokens: occurrences of all of them together.
        experts: experts that one occurrence ran on average.
    """

    least: int
    most: int
    tokens: int
    experts: float


def experts_by_frequency(
    index_TK: Tensor, token_ids_T: Tensor, num_experts: int, buckets: int = 5
) -> list[FrequencyBucket]:
    """Mean number of experts run for rare and for frequent tokens, rarest first.

    The vocabulary is sorted by its occurrences in the trace and cut where each bucket holds about T / buckets of them;
    tokens that occur equally often stay together, so there may be fewer buckets.
    """
    if not len(token_ids_T):
        return []
    _, vocabulary_T, occurrences_V = torch.unique(token_ids_T, return_inverse=True, return_counts=True)
    frequency_T = occurrences_V[vocabulary_T]
    sorted_T = frequency_T.sort().values
    ends = (torch.arange(1, buckets + 1) * len(sorted_T) // buckets - 1).clamp(min=0)
    limits = sorted_T[ends].unique()
    bucket_T = torch.bucketize(frequency_T, limits)
    experts_T = experts_per_token(index_TK, num_experts).to(torch.float64)
    return [
        FrequencyBucket(
            least=int(frequency_T[inside_T].min()),
            most=int(frequency_T[inside_T].max()),
            tokens=int(inside_T.sum()),
            experts=float(experts_T[inside_T].mean()),
        )
        for inside_T in (bucket_T == number for number in range(len(limits)))
    ]


def nulls_by_frequency(counts: LayerCounts, *, buckets: int = 5, min_count: int = 1) -> MetricResult:
    """Share of the selections that were null experts, for rare and for frequent token ids, rarest first.

    Ids are sorted by their occurrences and cut where each bucket holds about as many tokens; ids that occur equally often
    stay together, so there may be fewer buckets. With c_xj the selections of column j by id x, a bucket has the share
    sum_x sum_(j >= N) c_xj / sum_x sum_j c_xj ("value"), and sum_x sum_(j < N) c_xj / tokens experts for a token
    ("experts", before drops). The value of the layer is the share over all tokens, the reference that of balanced picks,
    m / (N + m) for m nulls (AdaMoE, arXiv 2406.13233, section 3).

    Args:
        counts: with the table "token".
        buckets: their number.
        min_count: occurrences of an id at least.
    """
    group = counts.group("token").at_least(min_count)
    order_G = group.tokens_G.argsort(stable=True)
    frequency_G, tokens = group.tokens_G[order_G], int(group.tokens_G.sum())
    table_GM = torch.zeros(len(group), 2, dtype=torch.int64)
    null_P = (group.column_P >= counts.num_experts).long()
    table_GM.index_put_((group.group_P.long(), null_P), group.chosen_P, accumulate=True)
    ends = (torch.arange(1, buckets + 1) * tokens) // buckets
    if len(group):
        last = torch.searchsorted(frequency_G.cumsum(0), ends).clamp(max=len(group) - 1)
        bucket_G = torch.bucketize(group.tokens_G, frequency_G[last].unique())
    else:
        bucket_G = torch.empty(0, dtype=torch.int64)
    rows = []
    for bucket in bucket_G.unique().tolist():
        inside_G = bucket_G == bucket
        experts, nulls = table_GM[inside_G].sum(0).tolist()
        inside = group.tokens_G[inside_G]
        total = int(inside.sum())
        rows.append(
            (int(inside.min()), int(inside.max()), total, nulls / (experts + nulls or math.nan), experts / total)
        )
    columns = list(zip(*rows, strict=True)) or [()] * 5
    names = ("least", "most", "count", "value", "experts")
    kinds = (*(torch.int64,) * 3, *(torch.float64,) * 2)
    table = {name: torch.tensor(values, dtype=kind) for name, values, kind in zip(names, columns, kinds, strict=True)}
    return MetricResult(
        metric="null_share_by_frequency",
        layer=counts.layer,
        value=null_share(counts.chosen_M, counts.num_experts),
        top_k=counts.top_k,
        num_columns=counts.num_columns,
        reference=counts.num_null / counts.num_columns,
        values={"experts_per_token": float(counts.chosen_M[: counts.num_experts].sum()) / (counts.tokens or math.nan)},
        table={"label": torch.arange(len(rows)), **table},
        min_count=min_count,
        conventions={"drops": "before", "buckets": buckets},
    )
