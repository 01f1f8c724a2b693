"""Every rank of a group gets the tokens of all, and sends back its share of each one's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from moesaic.dist.exchange.collectives import Pending, Then, all_gather, all_to_all, sum_dtype
from moesaic.dist.exchange.traffic import Traffic


@dataclass(frozen=True)
class Everywhere:
    """All-gather out, reduce-scatter back.

    The reduce-scatter is an all-to-all and a sum here: the same bytes, but added in float32 in the order of the ranks,
    which collectives promise for no backend.

    Attributes:
        group: the ranks.
        tokens_P: how many tokens each rank has.
        traffic: where bytes and waiting are counted.
    """

    group: dist.ProcessGroup
    tokens_P: Sequence[int]
    traffic: Traffic | None = None

    def out(self, tokens_TX: Tensor) -> Pending:
        return all_gather(tokens_TX, self.tokens_P, self.group, self.traffic)

    def back(self, rows_RX: Tensor) -> Pending:
        own = [self.tokens_P[self.group.rank()]] * len(self.tokens_P)
        return Then(all_to_all(rows_RX, self.tokens_P, own, self.group, self.traffic), self._sum)

    def _sum(self, rows_SX: Tensor) -> Tensor:
        first_TX, *others = rows_SX.chunk(len(self.tokens_P)) if rows_SX.shape[0] else [rows_SX]
        total_TX = first_TX.to(sum_dtype(rows_SX), copy=True)
        for other_TX in others:
            total_TX += other_TX
        return total_TX
