"""Counts by position in the sequence, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

BUCKETS = 256


@dataclass
class PositionCounts:
    """Picks, and dropped picks, by position, in buckets of equal width.

    There are at most 256 buckets: when a position lies beyond them, neighbours are merged and the width doubles. So up
    to 256 positions are counted one by one, and longer sequences take no more memory.

    Attributes:
        width: positions in a bucket, a power of two.
        picks_P: picks of experts by bucket, before any was dropped, int64; its length goes up to the last pick.
        dropped_P: those of them that a capacity dropped.
    """

    width: int = 1
    _counts: Tensor = field(default_factory=lambda: torch.zeros(2, BUCKETS, dtype=torch.int64), repr=False)

    @property
    def picks_P(self) -> Tensor:
        """See the class."""
        return self._counts[0, : self._used]

    @property
    def dropped_P(self) -> Tensor:
        """See the class."""
        return self._counts[1, : self._used]

    @property
    def _used(self) -> int:
        return int(self._counts[0].nonzero().max()) + 1 if self._counts[0].any() else 0

    def add(self, position_T: Tensor, picks_T: Tensor, dropped_T: Tensor) -> None:
        """Count tokens.

        Args:
            position_T: position of each token, from 0.
            picks_T: its picks of experts.
            dropped_T: how many of them were dropped.
        """
        if not position_T.numel():
            return
        while int(position_T.max()) >= self.width * BUCKETS:
            merged = self._counts.view(2, BUCKETS // 2, 2).sum(-1)
            self._counts = torch.cat([merged, torch.zeros_like(merged)], dim=1)
            self.width *= 2
        bucket_T = position_T // self.width
        self._counts.index_add_(1, bucket_T, torch.stack([picks_T, dropped_T]).long())

    @classmethod
    def total(cls, counts: Iterable[PositionCounts]) -> PositionCounts:
        """The counts of several together; buckets of unequal width are counted at their first position."""
        total = cls()
        for count in counts:
            starts_P = torch.arange(len(count.picks_P)) * count.width
            total.add(starts_P, count.picks_P, count.dropped_P)
        return total
