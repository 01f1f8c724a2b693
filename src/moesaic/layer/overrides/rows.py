"""Different overrides for the rows of one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer.asked import Asked, asked_of, merged
from moesaic.layer.override import OverrideFactory, RoutingOverride
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import Router


@dataclass(frozen=True, eq=False)
class SourceRows:
    """What the rows of a batch were made of, where a decoder repeats or leaves out rows of the batch it was given.

    Attributes:
        rows: for each row, the one of the given batch that it stands for.
        batch: rows of the given batch.
    """

    rows: tuple[int, ...]
    batch: int


_SOURCES: ContextVar[SourceRows | None] = ContextVar("source_rows", default=None)


@contextlib.contextmanager
def from_rows(sources: SourceRows | None) -> Iterator[None]:
    """Forward passes of this thread inside the block have these rows: `RowOverrides` are for the batch they come from."""
    token = _SOURCES.set(sources)
    try:
        yield
    finally:
        _SOURCES.reset(token)


class RowOverrides:
    """An `OverrideFactory` with an override, or None, for each row of a batch.

    A batch of B rows may have fewer entries, R, if R divides B: row b then has entry b // (B / R), which is how
    transformers' `generate` lays out beams and several sequences of a prompt. K is that of the widest row, and others are
    filled up with picks of nothing, of weight 0. A row without an override keeps its routing bit for bit.

    Args:
        factories: for each row. Rows with the same object are computed together.
        literal: whether they are for the rows of the forward pass as it is, also inside `from_rows`.
    """

    def __init__(self, factories: Sequence[OverrideFactory | None], *, literal: bool = False) -> None:
        if not factories:
            raise ConfigError("rows", [], "is empty", "give an override or None for each row of the batch")
        self._rows, self._literal = list(factories), literal
        self._last: _Rows | None = None

    def __call__(self, context: RoutingContext, num_tokens: int) -> RoutingOverride | None:
        sources = None if self._literal else _SOURCES.get()
        batch, given = context.batch_size if sources is None else sources.batch, len(self._rows)
        if batch % given:
            raise ConfigError(
                "rows",
                given,
                f"entries do not fit a batch of {batch} rows",
                "give one for each row, or for each prompt",
            )
        rows, parts, own_T = self._rows_of(context.batch_size, num_tokens, sources), [], None
        for factory, has_T in rows.tokens:
            made = None if factory is None else factory(_only(context, has_T), num_tokens)
            if made is None:
                own_T = has_T if own_T is None else own_T | has_T
            else:
                parts.append((made, has_T))
        return _RowsPass(tuple(parts), own_T, rows.merged) if parts else None

    def _rows_of(self, batch: int, num_tokens: int, sources: SourceRows | None) -> _Rows:
        # Steps of decoding are all alike.
        last = self._last
        if last is None or (last.batch, last.num_tokens, last.sources) != (batch, num_tokens, sources):
            given = batch if sources is None else sources.batch
            tokens = []
            for factory in {id(factory): factory for factory in self._rows}.values():
                has_R = torch.tensor([other is factory for other in self._rows])
                has_B = has_R.repeat_interleave(given // len(self._rows))
                if sources is not None:
                    has_B = has_B[list(sources.rows)]
                tokens.append((factory, has_B.repeat_interleave(num_tokens // batch)))
            last = self._last = _Rows(batch, num_tokens, sources, tuple(tokens))
        return last


@dataclass(frozen=True)
class _Rows:
    """Whose the tokens of a shape of batch are.

    Attributes:
        batch: B.
        num_tokens: T.
        sources: what the rows were made of.
        tokens: each factory, and None, with the tokens of its rows: bool (T,).
        merged: what all of them ask for, by what each does.
    """

    batch: int
    num_tokens: int
    sources: SourceRows | None
    tokens: tuple[tuple[OverrideFactory | None, Tensor], ...]
    merged: dict[tuple[Asked | int, ...], Asked] = field(default_factory=dict)


@dataclass(frozen=True)
class _RowsPass:
    parts: tuple[tuple[RoutingOverride, Tensor], ...]
    own_T: Tensor | None
    merged: dict[tuple[Asked | int, ...], Asked]

    def __call__(self, layer: int, router: Router, routing: Routing, context: RoutingContext) -> Routing:
        device = routing.index_TK.device
        found = []
        for override, has_T in self.parts:
            has_T = has_T.to(device)
            found.append((override(layer, router, routing, _only(context, has_T)), has_T))
        if all(made is routing for made, _ in found):
            return routing
        merged = found[0][0] if self.own_T is None else routing
        for made, has_T in found:
            merged = _merge(merged, made, has_T)
        return merged

    def asked(self, layer: int, num_experts: int, top_k: int) -> Asked | None:
        """See `SaysPicks`."""
        parts, key = [], [top_k]
        for override, has_T in self.parts:
            asked = asked_of(override, layer, num_experts, top_k)
            if asked is None:
                return None
            parts.append((asked, has_T))
            key += [asked, id(has_T)]
        found = self.merged.get(tuple(key))
        if found is None:
            found = merged(parts, self.own_T, top_k)
            if found.lasting:
                self.merged[tuple(key)] = found
        return found


def _merge(first: Routing, second: Routing, second_T: Tensor) -> Routing:
    """The picks of the second routing for these tokens, and of the first for all others."""
    if first is second:
        return first
    width, nothing = max(first.top_k, second.top_k), first.num_columns
    second_T1 = second_T.unsqueeze(-1)

    def either(one_TK: Tensor, other_TK: Tensor, fill: int) -> Tensor:
        one_TK, other_TK = (F.pad(part, (0, width - part.shape[-1]), value=fill) for part in (one_TK, other_TK))
        return torch.where(second_T1, other_TK, one_TK)

    identity_T = first.identity_weight_T
    if identity_T is not None and second.identity_weight_T is not None:
        identity_T = torch.where(second_T, second.identity_weight_T, identity_T)
    return replace(
        first,
        index_TK=either(first.index_TK, second.index_TK, first.num_experts),
        weight_TK=either(first.weight_TK, second.weight_TK, 0),
        chosen_TK=either(first.choice_TK, second.choice_TK, nothing),
        selection_TN=torch.where(second_T1, second.selection_TN, first.selection_TN),
        identity_weight_T=identity_T,
        overridden=True,
    )


def _only(context: RoutingContext, has_T: Tensor) -> RoutingContext:
    """The context in which all other tokens are padding."""
    mask_T = has_T if context.mask_T is None else context.mask_T & has_T.to(context.mask_T.device)
    return replace(context, mask_T=mask_T)
