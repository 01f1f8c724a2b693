"""Bootstrap over documents: tokens of one document are alike, so drawing tokens would make every band too narrow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.trace.counts.count import count
from moesaic.trace.counts.routing import RoutingCounts
from moesaic.trace.header import TraceHeader
from moesaic.trace.metrics.result import Band
from moesaic.trace.rows import RoutingLog, Rows


def block_weights(blocks: int, replicates: int, seed: int = 0) -> Tensor | None:
    """How often each block of documents is drawn in each replicate, float64 (R, B); None for fewer than two blocks.

    Each replicate draws as many blocks as there are, with replacement.
    """
    if blocks < 2 or replicates < 1:
        return None
    drawn_RB = np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=replicates)
    return torch.from_numpy(drawn_RB).to(torch.float64)


def band_of(values_R: Tensor, level: float = 0.95) -> Band:
    """Percentile interval of the replicates; those that are NaN are left out."""
    known = values_R[~values_R.isnan()]
    if not len(known):
        return Band(float("nan"), float("nan"), level)
    low, high = torch.quantile(known, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=known.dtype)).tolist()
    return Band(low, high, level)


def count_blocks(log: RoutingLog, parts: int = 20, **settings: Any) -> list[RoutingCounts]:
    """Counts of so many disjoint parts of the documents, for `bootstrap` of any metric; document % parts is the part.

    Reads the log once for each part, and holds as many counts.

    Args:
        log: the trace.
        parts: their number; those without a document are left out.
        settings: of `count`.

    Raises:
        ConfigError: if `parts` is below 2.
    """
    if parts < 2:
        raise ConfigError("parts", parts, "is too few to draw from", "choose 2 or more")
    found = [count(_Part(log, part, parts), **settings) for part in range(parts)]
    return [counts for counts in found if counts.documents]


def bootstrap(
    parts: Sequence[RoutingCounts],
    statistic: Callable[[RoutingCounts], float],
    *,
    replicates: int = 100,
    level: float = 0.95,
    seed: int = 0,
) -> Band:
    """Percentile band of any function of counts, by drawing parts of the documents with replacement.

    Args:
        parts: from `count_blocks`.
        statistic: of the counts of a draw.
        replicates: draws.
        level: share of the draws inside the band.
        seed: of the draws.

    Raises:
        ConfigError: if there are fewer than two parts.
    """
    weight_RB = block_weights(len(parts), replicates, seed)
    if weight_RB is None:
        raise ConfigError("parts", len(parts), "is too few to draw from", "count at least two documents in parts")
    values = []
    for drawn in weight_RB.int().tolist():
        scaled = [_times(counts, times) for counts, times in zip(parts, drawn, strict=True) if times]
        values.append(statistic(reduce(add, scaled)))
    return band_of(torch.tensor(values, dtype=torch.float64), level)


class _Part:
    """A log of some of the documents of another."""

    def __init__(self, log: RoutingLog, part: int, parts: int) -> None:
        self._log, self._part, self._parts = log, part, parts

    @property
    def header(self) -> TraceHeader:
        return self._log.header

    def rows(self, layers: Collection[int] | None = None) -> Iterator[Rows]:
        for rows in self._log.rows(layers):
            mine_T = rows.tokens.document_T % self._parts == self._part
            if mine_T.any():
                yield rows[mine_T]


_NUMBERS = ("label_G", "group_P", "column_P", "domain_G", "block_G", "forgotten_F")
"""Tensors that say what is counted; all others are counts."""


def _times(value: Any, times: int, name: str = "") -> Any:
    """Counts of the same text this many times."""
    if isinstance(value, Tensor):
        return value if name in _NUMBERS else value * times
    if isinstance(value, dict):
        return {key: _times(inner, times) for key, inner in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(
            value,
            **{
                key: _times(inner, times, key)
                for key, inner in changed.items()
                if isinstance(inner, Tensor | dict) or key in ("tokens", "forgotten", "documents")
            },
        )
    return value * times if isinstance(value, int) else value
