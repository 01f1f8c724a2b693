"""A stand-in for the exchange of tokens: it makes tensors of the sizes that a balanced load gives, and moves nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moesaic.dist.config import Exchange


def expected_ranks(columns: float, picks: int, experts: int, ranks: int) -> float:
    """How many of `ranks`, each holding `experts` experts, the picks of a token touch.

    Every set of K different columns out of M being equally likely, a rank with E experts is missed with probability
    C(M - E, K) / C(M, K).

    Args:
        columns: M, experts and null experts of the layer; continuous, as the binomials are.
        picks: K.
        experts: E.
        ranks: how many ranks there are.
    """
    picks = min(picks, int(columns))
    if columns - experts < picks:
        return float(ranks)
    missed = (
        math.lgamma(columns - experts + 1)
        - math.lgamma(columns - experts - picks + 1)
        - math.lgamma(columns + 1)
        + math.lgamma(columns - picks + 1)
    )
    return ranks * (1 - math.exp(missed))


@dataclass(frozen=True)
class Sent:
    """What a rank sends in the exchange of one MoE layer under a balanced load.

    Attributes:
        rows: rows to the ranks of its `ep` group, itself included; as many arrive.
        picks: K, the picks that go with each.
        row_bytes: bytes of a row.
        sends: how often tokens go out in a forward and a backward pass: twice where the layer is recomputed.
        fetches: how often outputs come back. Recomputation stops when it has what backward needs, often before that.
    """

    rows: int
    picks: int
    row_bytes: int
    sends: int = 0
    fetches: int = 0


@dataclass
class BalancedDispatch:
    """The dispatch of a layer, for a run on fake tensors.

    Attributes:
        num_experts: N of the whole layer.
        columns: M, experts and null experts.
        share: of the tokens, those that the layer does not skip.
        ep: ranks that share the experts.
        esp: ranks that share each expert.
        exchange: how tokens travel.
        slots: tokens that an expert takes of each rank; None for any number.
        sent: what each call sends, and how many there were.
    """

    num_experts: int
    columns: float
    share: float
    ep: int
    esp: int
    exchange: Exchange
    slots: int | None = None
    sent: Sent | None = field(default=None, compare=False)

    def send(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, **_: Any) -> _BalancedTravel:
        """As `Dispatch.send`."""
        tokens, picks = index_TK.shape
        if self.sent is None:
            self.sent = Sent(self.rows(tokens, picks), picks, x_TD.shape[1] * x_TD.element_size())
        self.sent = replace(self.sent, sends=self.sent.sends + 1)
        return _BalancedTravel(self, self.sent.rows, x_TD, index_TK, weight_TK)

    def rows(self, tokens: int, picks: int) -> int:
        """Rows that a rank sends."""
        local = self.num_experts // self.ep
        if self.exchange == "all_gather":
            return self.ep * tokens
        if self.exchange == "padded" and self.slots is not None:
            return self.ep * min(tokens, local * self.slots)
        return round(self.share * tokens * expected_ranks(self.columns, picks, local, self.ep))


@dataclass(frozen=True)
class _BalancedTravel:
    dispatch: BalancedDispatch
    rows: int
    x_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor

    def arrive(self) -> tuple[Tensor, Tensor, Tensor]:
        picks, esp = self.index_TK.shape[1], self.dispatch.esp
        token_S = self._indices(self.rows)
        rows_RD = _Move.apply(_Move.apply(self.x_TD, self.rows, token_S), self.rows)
        weight_RK = _Move.apply(self.weight_TK, self.rows)
        if esp > 1:
            rows_RD, weight_RK = _Move.apply(rows_RD, esp * self.rows), _Move.apply(weight_RK, esp * self.rows)
        return rows_RD, self._indices(esp * self.rows, picks), weight_RK

    def combine(self, rows_RD: Tensor) -> Tensor:
        tokens, picks = self.index_TK.shape
        assert self.dispatch.sent is not None
        self.dispatch.sent = replace(self.dispatch.sent, fetches=self.dispatch.sent.fetches + 1)
        if self.dispatch.esp > 1:
            rows_RD = _Move.apply(rows_RD, self.rows)
        place_TM = self._indices(tokens, min(picks, self.dispatch.ep))
        return _Move.apply(_Move.apply(rows_RD, self.rows), tokens, place_TM)

    def _indices(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.x_TD.device)


def exchanged_columns(columns_WTC: Tensor) -> Tensor:
    """Rows (T, D) of a rank's tokens, from its columns of the tokens of all W ranks."""
    received_XC = _Move.apply(columns_WTC.flatten(0, 1), columns_WTC.shape[0] * columns_WTC.shape[1])
    return received_XC.view(columns_WTC.shape).transpose(0, 1).reshape(columns_WTC.shape[1], -1)


class _Move(torch.autograd.Function):
    """Rows that a collective or a copy returns: new memory; backward is the same the other way.

    The graph holds the indices that a copy needs again, as the exchange does: recomputation does not make them anew.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, count: int, *indices: Tensor) -> Tensor:
        ctx.count, ctx.indices = rows.shape[0], indices
        return rows.new_empty(count, *rows.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad.new_empty(ctx.count, *grad.shape[1:]), None, *[None] * len(ctx.indices)
