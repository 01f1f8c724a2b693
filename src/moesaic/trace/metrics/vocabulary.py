"""Vocabulary specialisation: how surely a token id goes to one expert."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.trace.counts.routing import LayerCounts
from moesaic.trace.metrics.result import MetricResult, mean

_DRAWS = 64
_SAMPLED = 64
"""Ids with more occurrences draw each expert's count on its own, which K > 1 leaves nearly independent."""


def vocabulary_specialisation(
    counts: LayerCounts,
    *,
    ids: Literal["token", "next", "predicted", "previous"] = "token",
    first: bool = True,
    min_count: int = 1,
    weighting: Literal["ids", "occurrences"] = "ids",
    denominator: Literal["occurrences", "picks"] = "occurrences",
    chance: bool = True,
) -> MetricResult:
    """V(e, x) = N_xe / N_x, credited to the column with the most: the lowest of equals (OLMoE, 2409.02060, eq. 8).

    The value is the mean over ids of max_e V(e, x). An id that occurs once is always certain (1 for K = 1), so see
    the reference, which is the same mean for random routers with this layer's load and the same occurrences; ask for
    `min_count`, or weigh by occurrences. The table is that of the columns: ids credited to each ("count"), their
    occurrences ("tokens") and their mean V ("value", NaN where there is no id). `values`: "ids", and the mean of V by
    the other weighting ("by_ids", "by_occurrences").

    Args:
        counts: of the layer.
        ids: x is the id of the token itself, of the "next" one in its document (which is what the model should say), the
            one that the model predicted, or the "previous" one.
        first: N_xe counts first choices only; otherwise any rank.
        min_count: occurrences of an id at least. OLMoE's means take 1, its tables of ids 10.
        weighting: ids count alike, or by their occurrences.
        denominator: N_x is the "occurrences" of x, so V goes up to 1, as in OLMoE's code; or its "picks", as in the text,
            so it goes up to 1 / K.
        chance: compute the reference, which draws random routers.
    """
    for name, value, allowed in (
        ("ids", ids, ("token", "next", "predicted", "previous")),
        ("weighting", weighting, ("ids", "occurrences")),
        ("denominator", denominator, ("occurrences", "picks")),
    ):
        if value not in allowed:
            raise ConfigError(name, value, "is not one of the choices", f"choose one of {allowed}")
    table = counts.group(ids).at_least(min_count)
    table = table[table.picks_G(first=first) > 0]
    count_P = (table.first_P if first else table.chosen_P).to(torch.float64)
    most_G = torch.zeros(len(table), dtype=torch.float64).scatter_reduce(0, table.group_P.long(), count_P, "amax")
    # Pairs of a group are in ascending order of columns: the first with the most.
    best_P = count_P == most_G[table.group_P]
    column_G = torch.full((len(table),), table.num_columns, dtype=torch.int64)
    column_G = column_G.scatter_reduce(0, table.group_P[best_P].long(), table.column_P[best_P].long(), "amin")
    occurrences_G = table.tokens_G.to(torch.float64)
    below_G = occurrences_G if denominator == "occurrences" else table.picks_G(first=first).to(torch.float64)
    sure_G = most_G / below_G
    by_ids, by_occurrences = mean(sure_G), mean(sure_G, occurrences_G)
    ids_M = torch.bincount(column_G, minlength=table.num_columns)
    sums_M = torch.zeros(table.num_columns, dtype=torch.float64).index_add(0, column_G, sure_G)
    tokens_M = torch.zeros(table.num_columns, dtype=torch.int64).index_add(0, column_G, table.tokens_G)
    top_k = 1 if first else counts.top_k
    reference = None
    if chance and len(table):
        load_M = (counts.first_M if first else counts.chosen_M).numpy()
        expected_G = _expected_most(table.tokens_G, load_M, top_k) / (1 if denominator == "occurrences" else top_k)
        reference = mean(expected_G, occurrences_G if weighting == "occurrences" else None)
    return MetricResult(
        metric=f"vocabulary_specialisation_{ids}",
        layer=counts.layer,
        value=by_ids if weighting == "ids" else by_occurrences,
        top_k=top_k,
        num_columns=table.num_columns,
        reference=reference,
        values={"ids": float(len(table)), "by_ids": by_ids, "by_occurrences": by_occurrences},
        table={
            "label": torch.arange(table.num_columns),
            "count": ids_M,
            "tokens": tokens_M,
            "value": sums_M / ids_M.to(torch.float64).where(ids_M > 0, math.nan),
        },
        min_count=min_count,
        conventions={
            "ids": ids,
            "ranks": "first" if first else "all",
            "weighting": weighting,
            "denominator": denominator,
            "forgotten_tokens": table.forgotten,
        },
    )


def _expected_most(tokens_G: Tensor, load_M: np.ndarray, top_k: int) -> Tensor:
    """E[max_e c_e] / m for m occurrences routed at random with the layer's load, by drawing, float64 (G,)."""
    generator = np.random.default_rng(0)
    size_S, index_G = tokens_G.unique(return_inverse=True)
    share_M = load_M / load_M.sum()
    columns = len(share_M)
    expected = []
    for size in size_S.tolist():
        draws = max(_DRAWS // max(size // _SAMPLED, 1), 4)
        if top_k == 1:
            most_R = generator.multinomial(size, share_M, size=draws).max(-1)
        elif size <= _SAMPLED:
            # The K largest of log share + Gumbel noise: K columns without replacement, by their share.
            key = generator.gumbel(size=(draws, size, columns)) + np.log(np.maximum(share_M, 1e-300))
            picked = np.argpartition(-key, top_k - 1, axis=-1)[..., :top_k] if top_k < columns else None
            if picked is None:
                most_R = np.full(draws, size)
            else:
                flat = picked.reshape(draws, -1) + np.arange(draws)[:, None] * columns
                most_R = np.bincount(flat.ravel(), minlength=draws * columns).reshape(draws, columns).max(-1)
        else:
            most_R = generator.binomial(size, np.minimum(top_k * share_M, 1), size=(draws, columns)).max(-1)
        expected.append(most_R.mean() / size)
    return torch.tensor(expected, dtype=torch.float64)[index_G]
