"""A token goes once to each rank that holds one of its experts: the pairs of token and rank, and sums over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moesaic.dist.exchange.collectives import Pending, Then, sum_dtype


class Mover(Protocol):
    """An all-to-all of rows, there and back.

    Counts are lists of rows for each rank of the group: what is sent and what is received come first.
    """

    @property
    def size(self) -> int:
        """Ranks in the group, P."""
        ...

    def learn(self, sent_P: Tensor) -> Tensor:
        """The counts as a tensor on the device, from how many rows this rank sends to each."""
        ...

    def out(self, rows_SX: Tensor, counts: Sequence[Sequence[int]]) -> Pending:
        """Start to send rows, those for rank 0 first; those from rank 0 arrive first."""
        ...

    def back(self, rows_RX: Tensor, counts: Sequence[Sequence[int]], spare: int) -> Pending:
        """Start to send what arrived back to where it came from; it arrives with so many rows of zeros at its end."""
        ...


@dataclass(frozen=True)
class Pairs:
    """S rows to send, in the order of their ranks.

    Attributes:
        token_S: the token of each row; T for a row of zeros.
        place_TM: the up to M rows of each token in the order of their ranks; S where a token has fewer.
        has_gaps: whether there are rows of zeros.
    """

    token_S: Tensor
    place_TM: Tensor
    has_gaps: bool = False

    def spread(self, tokens_TX: Tensor) -> Tensor:
        """Copy tokens to their rows."""
        if not self.has_gaps:
            return tokens_TX.index_select(0, self.token_S)
        gap_S1 = (self.token_S == tokens_TX.shape[0]).unsqueeze(-1)
        rows_SX = tokens_TX.index_select(0, self.token_S.clamp(max=tokens_TX.shape[0] - 1))
        return rows_SX.masked_fill_(gap_S1, 0)

    def collect(self, rows_SX: Tensor) -> Tensor:
        """Sum each token's rows in the order of their ranks; the input has a row of zeros at its end.

        No atomic addition, whose order would change the sum from run to run.
        """
        total_TX = rows_SX.index_select(0, self.place_TM[:, 0])
        if self.place_TM.shape[1] > 1:
            total_TX = total_TX.to(sum_dtype(rows_SX))
            for pick in range(1, self.place_TM.shape[1]):
                total_TX += rows_SX.index_select(0, self.place_TM[:, pick])
        return total_TX


@dataclass(frozen=True)
class PairCarrier:
    """Takes tokens to the ranks of their pairs."""

    mover: Mover
    pairs: Pairs
    counts: Sequence[Sequence[int]]

    def out(self, tokens_TX: Tensor) -> Pending:
        return self.mover.out(self.pairs.spread(tokens_TX), self.counts)

    def back(self, rows_RX: Tensor) -> Pending:
        return Then(self.mover.back(rows_RX, self.counts, spare=1), self.pairs.collect)


def meets(index_TK: Tensor, num_experts: int, size: int) -> Tensor:
    """Whether a rank holds one of a token's picks, (P, T); an index of N is nowhere."""
    rank_TK = index_TK // (num_experts // size)
    goes_TP = torch.zeros(index_TK.shape[0], size + 1, dtype=torch.bool, device=index_TK.device)
    return goes_TP.scatter_(1, rank_TK, True)[:, :size].t().contiguous()


def pairs_at(place_PT: Tensor, goes_PT: Tensor, rows: int, top_k: int) -> Pairs:
    """Pairs from the row of each one.

    Args:
        place_PT: row of each pair, where there is one.
        goes_PT: where there is one.
        rows: S.
        top_k: K; no token has more pairs than picks.
    """
    ranks, tokens = goes_PT.shape
    place_PT = place_PT.masked_fill(~goes_PT, rows)
    token_PT = torch.arange(tokens, device=place_PT.device).expand(ranks, tokens)
    # Pairs that do not exist all write to a row that is cut off.
    token_S = torch.full((rows + 1,), tokens, device=place_PT.device)
    token_S = token_S.scatter_(0, place_PT.reshape(-1), token_PT.reshape(-1))[:rows]
    place_TM = place_PT.t()
    if ranks > top_k:
        place_TM = place_TM.sort(1).values[:, : max(1, top_k)]
    return Pairs(token_S, place_TM.contiguous())
