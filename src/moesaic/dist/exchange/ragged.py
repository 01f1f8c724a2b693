"""Uneven parts: exactly the rows that are needed travel, after the ranks have told each other how many."""

from __future__ import annotations

from torch import Tensor

from moesaic.dist.exchange.pairs import Pairs, meets, pairs_at


class Ragged:
    """The pairs of tokens and ranks, whose number is known on the device only.

    Args:
        index_TK: picks, N for no expert.
        num_experts: N over all ranks.
        size: number of ranks P.

    Attributes:
        sent_P: how many rows go to each rank, on the device.
    """

    def __init__(self, index_TK: Tensor, num_experts: int, size: int) -> None:
        self._goes_PT = meets(index_TK, num_experts, size)
        self._top_k = index_TK.shape[1]
        self.sent_P = self._goes_PT.sum(1)

    def pairs(self, rows: int) -> Pairs:
        """The pairs, once it is known on the host how many there are."""
        place_PT = self._goes_PT.view(-1).cumsum(0).view_as(self._goes_PT) - 1
        return pairs_at(place_PT, self._goes_PT, rows, self._top_k)
