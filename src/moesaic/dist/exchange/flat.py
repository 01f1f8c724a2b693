"""The all-to-all in one step: each rank sends to each other rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.dist.exchange.collectives import Pending, all_to_all
from moesaic.dist.exchange.traffic import Traffic


@dataclass(frozen=True)
class Flat:
    """A mover in one all-to-all.

    Attributes:
        group: the ranks.
        traffic: where bytes and waiting are counted.
    """

    group: dist.ProcessGroup
    traffic: Traffic | None = None

    @property
    def size(self) -> int:
        """Ranks in the group, P."""
        return self.group.size()

    def learn(self, sent_P: Tensor) -> Tensor:
        ones = [1] * self.size
        return torch.stack([sent_P, all_to_all(sent_P, ones, ones, self.group, self.traffic).wait()])

    def out(self, rows_SX: Tensor, counts: Sequence[Sequence[int]]) -> Pending:
        return all_to_all(rows_SX, counts[0], counts[1], self.group, self.traffic)

    def back(self, rows_RX: Tensor, counts: Sequence[Sequence[int]], spare: int) -> Pending:
        return all_to_all(rows_RX, counts[1], counts[0], self.group, self.traffic, spare)
