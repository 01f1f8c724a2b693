"""The way of tokens to other ranks and back, differentiable, where starting and arriving are apart in both passes.

What a carrier takes out, its backward pass takes back, and the other way round. Each way has two nodes in the autograd
graph: `_Depart`, which starts the collective, and `_Land`, which waits for it. Backward they swap their parts, so that
what ran between them in the forward pass (shared experts) has its backward pass while gradients travel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moesaic.dist.exchange.collectives import Pending


class Carrier(Protocol):
    """Takes tokens out to the ranks that need them, and rows back."""

    def out(self, tokens_TX: Tensor) -> Pending:
        """Start to send tokens; rows_RX arrive. A row that no token fills is zero."""
        ...

    def back(self, rows_RX: Tensor) -> Pending:
        """Start to send rows back; tokens_TX arrive, each the sum of its rows, not rounded to the rows' dtype."""
        ...


@dataclass
class _Way:
    """One way of a trip: the carrier, which way it is, in which dtypes rows travel and arrive, and what is under way now."""

    carrier: Carrier
    outward: bool
    travel_dtype: torch.dtype
    arrival_dtype: torch.dtype
    under_way: list[Pending] = field(default_factory=list)
    coming_back: list[Pending | None] = field(default_factory=list)
    weight_dtype: torch.dtype | None = None
    wanted: tuple[bool, ...] = ()

    def start(self, values: Tensor, *, forward: bool) -> Pending:
        return self.carrier.out(values) if forward == self.outward else self.carrier.back(values)


@dataclass(frozen=True)
class Outbound:
    """Tokens on their way out."""

    way: _Way
    edge: Tensor

    def arrive(self) -> tuple[Tensor, Tensor, Tensor]:
        """rows_RD, index_RK, weight_RK."""
        return _Land.apply(self.edge, self.way)


def depart(
    carrier: Carrier, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, dtype: torch.dtype | None = None
) -> Outbound:
    """Start to send tokens with their picks; an index of 0 arrives where no token does.

    Args:
        carrier: how they travel.
        x_TD: hidden states.
        index_TK: picks, 0 for none.
        weight_TK: combine weights.
        dtype: in which hidden states travel and arrive; gradients are summed before they leave it. Their own if None.
    """
    dtype = dtype or x_TD.dtype
    way = _Way(carrier, True, travel_dtype=dtype, arrival_dtype=dtype, weight_dtype=weight_TK.dtype)
    return Outbound(way, _Depart.apply(way, index_TK, x_TD, weight_TK))


def bring_back(carrier: Carrier, rows_RD: Tensor, dtype: torch.dtype) -> Tensor:
    """y_TD of a dtype, the sum of the rows of each token that departed."""
    way = _Way(carrier, False, travel_dtype=rows_RD.dtype, arrival_dtype=dtype)
    (y_TD,) = _Land.apply(_Depart.apply(way, None, rows_RD), way)
    return y_TD


class _Depart(torch.autograd.Function):
    """Starts; backward waits. What it returns is empty and only ties `_Land` to it."""

    @staticmethod
    def forward(ctx, way: _Way, index_TK: Tensor | None, *values: Tensor) -> Tensor:
        payload = [values[0].to(way.travel_dtype), *values[1:]]
        if index_TK is not None:
            payload[-1] = _packed(index_TK, values[-1])
        way.under_way = [way.start(value, forward=True) for value in payload]
        ctx.way = way
        ctx.dtypes = [value.dtype for value in values]
        way.wanted = ctx.needs_input_grad[2:]
        return values[0].new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pending, ctx.way.coming_back = ctx.way.coming_back, []
        grads = zip(pending, ctx.dtypes, strict=True)
        return None, None, *[None if value is None else value.wait().to(dtype) for value, dtype in grads]


class _Land(torch.autograd.Function):
    """Waits; backward starts."""

    @staticmethod
    def forward(ctx, edge: Tensor, way: _Way) -> tuple[Tensor, ...]:
        ctx.way = way
        arrived = [pending.wait() for pending in way.under_way]
        way.under_way = []
        if way.weight_dtype is None:
            return (arrived[0].to(way.arrival_dtype),)
        rows_RD, picks_R2K = arrived
        index_RK, weight_RK = _unpacked(picks_R2K, way.weight_dtype)
        constant = [value for value, wanted in zip((rows_RD, weight_RK), way.wanted, strict=True) if not wanted]
        ctx.mark_non_differentiable(index_RK, *constant)
        return rows_RD, index_RK, weight_RK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        way = ctx.way
        values = [grads[0].to(way.travel_dtype), *grads[2:]]
        way.coming_back = [
            way.start(grad, forward=False) if wanted else None for grad, wanted in zip(values, way.wanted, strict=True)
        ]
        return grads[0].new_empty(0), None


def _packed(index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Indices and weights in one tensor of integers, (T, 2K)."""
    weight_TK = weight_TK.to(torch.promote_types(weight_TK.dtype, torch.float32))
    integer = torch.int32 if weight_TK.dtype == torch.float32 else torch.int64
    return torch.cat([index_TK.to(integer), weight_TK.contiguous().view(integer)], 1)


def _unpacked(picks_R2K: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    top_k = picks_R2K.shape[1] // 2
    index_RK, weight_RK = picks_R2K[:, :top_k], picks_R2K[:, top_k:]
    floating = torch.float32 if picks_R2K.dtype == torch.int32 else torch.float64
    return index_RK.to(torch.int64), weight_RK.contiguous().view(floating).to(dtype)
