"""Routing of the same token after another context: how much of it the token alone decides."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

import numpy as np
import torch

from moesaic.errors import ConfigError, TraceError
from moesaic.trace.metrics.result import MetricResult
from moesaic.trace.metrics.saturation import aligned_rows, alike, overlap
from moesaic.trace.rows import RoutingLog

_OPEN_DOCUMENTS = 1 << 16
"""Newest documents that may go on in a later batch."""


def context_change(
    log: RoutingLog,
    changed: RoutingLog,
    *,
    by: Literal["distance", "token"] = "distance",
    layers: Collection[int] | None = None,
    exclude: Collection[int] = (),
    min_count: int = 1,
) -> dict[int, MetricResult]:
    """Share of a token's selections that change when the text before it changes, by layer.

    Two logs of one model, in which the same documents have the same ids at the same positions but for some that were
    replaced (a prefix, a domain's instructions, single words). Tokens whose ids are equal and that follow a replaced one
    in their document are compared: 1 - |A and B| / max(|A|, |B|). 0: the token alone decides; the reference is what
    unrelated routing would give, 1 - K / M. `values`: "rank_1" (share of tokens whose first choice changed), "tokens",
    and "before", the same share for tokens before any replaced one, which is 0 for causal models in one precision.

    The table holds for each distance from the last replaced token (1, 2, 4, 8, ...: the first of a bucket up to the
    next), or each token id, the tokens compared ("count"), the share ("value") and "rank_1".

    Args:
        log: one context.
        changed: the other.
        by: what the rows of the table are.
        layers: only these; None for all.
        exclude: ids that are not compared; replaced ones among them count as replaced.
        min_count: rows of the table have at least so many tokens.

    Raises:
        TraceError: if the logs have different layers, experts or positions, or no token was replaced.
    """
    if by not in ("distance", "token"):
        raise ConfigError("by", by, "is not one of the choices", "choose 'distance' or 'token'")
    facts = alike(log, changed, layers)
    special = np.array(sorted(exclude), dtype=np.int64)
    found = {layer: _Layer() for layer in facts}
    for layer, document_T, token_T, other_T, choice_TK, other_TK in aligned_rows(log, changed, facts):
        found[layer].add(document_T, token_T, other_T, choice_TK, other_TK, special, by)
    for layer, sums in found.items():
        if not sums.replaced:
            raise TraceError(
                f"layer {layer}: both traces have the same tokens; change the text before those to compare"
            )
    return {layer: found[layer].result(layer, *facts[layer], by=by, min_count=min_count) for layer in facts}


class _Layer:
    """Sums of one layer while rows stream by."""

    def __init__(self) -> None:
        self.replaced = 0
        self._before = np.zeros(2)
        self._since: dict[int, int] = {}
        self._sums: dict[int, np.ndarray] = {}

    def add(
        self,
        document_T: np.ndarray,
        token_T: np.ndarray,
        other_T: np.ndarray,
        choice_TK: np.ndarray,
        other_TK: np.ndarray,
        special: np.ndarray,
        by: str,
    ) -> None:
        order_T = np.argsort(document_T, kind="stable")
        document_T, token_T, other_T = document_T[order_T], token_T[order_T], other_T[order_T]
        replaced_T = token_T != other_T
        self.replaced += int(replaced_T.sum())
        distance_T = self._distances(document_T, replaced_T)
        lost_T = 1 - overlap(choice_TK[order_T], other_TK[order_T])
        first_T = choice_TK[order_T, 0] != other_TK[order_T, 0]
        kept_T = ~replaced_T & ~np.isin(token_T, special)
        before_T = kept_T & (distance_T < 0)
        self._before += (before_T.sum(), lost_T[before_T].sum())
        kept_T &= distance_T > 0
        label_T = token_T[kept_T] if by == "token" else 1 << np.log2(distance_T[kept_T]).astype(np.int64)
        labels, index_T = np.unique(label_T, return_inverse=True)
        sums = [
            np.bincount(index_T, weights=values_T, minlength=len(labels))
            for values_T in (lost_T[kept_T], first_T[kept_T])
        ]
        for label, row in zip(
            labels.tolist(), np.stack([np.bincount(index_T, minlength=len(labels)), *sums], 1), strict=True
        ):
            self._sums[label] = self._sums.get(label, np.zeros(3)) + row

    def _distances(self, document_T: np.ndarray, replaced_T: np.ndarray) -> np.ndarray:
        """Tokens since the last replaced one of the document, 0 at it, -1 before any; documents are in order."""
        if not len(document_T):
            return np.zeros(0, dtype=np.int64)
        place_T = np.arange(len(document_T))
        start_T = np.concatenate(([True], document_T[1:] != document_T[:-1]))
        first_T = np.maximum.accumulate(np.where(start_T, place_T, 0))
        last_T = np.maximum.accumulate(np.where(replaced_T, place_T, -1))
        here_T = last_T >= first_T
        # What an earlier batch knew of documents that go on.
        starts = np.flatnonzero(start_T)
        carried = np.array([self._since.get(number, -1) for number in document_T[starts].tolist()])
        carried_T = np.repeat(carried, np.diff(np.append(starts, len(document_T))))
        older_T = np.where(carried_T >= 0, carried_T + 1 + place_T - first_T, -1)
        distance_T = np.where(here_T, place_T - last_T, older_T)
        ends = np.append(starts[1:], len(document_T)) - 1
        self._since.update(zip(document_T[ends].tolist(), distance_T[ends].tolist(), strict=True))
        if len(self._since) > 2 * _OPEN_DOCUMENTS:
            self._since = dict(sorted(self._since.items())[-_OPEN_DOCUMENTS:])
        return distance_T

    def result(self, layer: int, top_k: int, columns: int, *, by: str, min_count: int) -> MetricResult:
        labels = sorted(label for label, row in self._sums.items() if row[0] >= min_count)
        table = torch.tensor(np.array([self._sums[label] for label in labels]).reshape(-1, 3))
        tokens, lost, first = np.array(list(self._sums.values())).reshape(-1, 3).sum(0).tolist()
        return MetricResult(
            metric=f"context_change_by_{by}",
            layer=layer,
            value=lost / (tokens or math.nan),
            top_k=top_k,
            num_columns=columns,
            reference=1 - top_k / columns,
            values={
                "rank_1": first / (tokens or math.nan),
                "tokens": tokens,
                "before": float(self._before[1]) / (float(self._before[0]) or math.nan),
            },
            table={
                "label": torch.tensor(labels, dtype=torch.int64),
                "count": table[:, 0].long(),
                "value": table[:, 1] / table[:, 0],
                "rank_1": table[:, 2] / table[:, 0],
            },
            min_count=min_count,
            conventions={"unequal_sets": "over the larger"},
        )
