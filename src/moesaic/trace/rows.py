"""`Rows`: the routing of some tokens in one layer, the unit in which traces are recorded, stored and read.

A trace is a `RoutingLog`: a header, and rows that come in bounded batches, from memory or from files alike. Metrics and
reports read nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from moesaic.layer import Routing
from moesaic.trace.header import TraceHeader

NOTHING = -1
"""Where a pick, a token id, a turn or a modality is missing."""


@dataclass(frozen=True)
class TokenColumns:
    """What is known of the tokens themselves, the same in every layer; all on the CPU, padding left out.

    Attributes:
        document_T: number of the token's document, int64: a sequence of a batch, or one of the documents packed in it.
        position_T: position in the document, from 0, int32.
        place_T: place in the row of the batch, from 0, int32: what fills a capacity.
        token_T: token id, int32; -1 where the model was given embeddings.
        domain_T: number of the domain in `TraceHeader.domains`, int16.
        turn_T: turn of a conversation, from 0, int16; -1 where nobody said.
        modality_T: modality id, int8; -1 where nobody said.
    """

    document_T: Tensor
    position_T: Tensor
    place_T: Tensor
    token_T: Tensor
    domain_T: Tensor
    turn_T: Tensor
    modality_T: Tensor

    def __len__(self) -> int:
        return len(self.document_T)

    def __getitem__(self, which: Tensor | slice) -> TokenColumns:
        """The tokens that a mask, indices or a slice name."""
        return TokenColumns(*(getattr(self, column.name)[which] for column in fields(self)))

    @classmethod
    def joined(cls, parts: list[TokenColumns]) -> TokenColumns:
        """Several one after the other."""
        return cls(*(torch.cat([getattr(part, column.name) for part in parts]) for column in fields(cls)))


@dataclass(frozen=True)
class Rows:
    """Routing of T tokens in one layer, on the CPU.

    Attributes:
        layer: index of the decoder layer.
        tokens: the tokens.
        choice_TK: what was selected, best first by what the router compared, before a capacity dropped any: an expert
            from 0 to N - 1, a null expert from N to M - 1, or -1 for nothing. An integer type.
        weight_TK: weight of each selection at combine, float32; 0 for nothing, NaN where it is not known or was not read.
        dropped_TK: selections that found their expert full, bool; None where nothing limits experts.
        scores_TM: the router's scores of all columns, float32, if they were asked for.
    """

    layer: int
    tokens: TokenColumns
    choice_TK: Tensor
    weight_TK: Tensor
    dropped_TK: Tensor | None = None
    scores_TM: Tensor | None = None

    def __len__(self) -> int:
        return len(self.choice_TK)

    def __getitem__(self, which: Tensor | slice) -> Rows:
        """The tokens that a mask, indices or a slice name."""
        return replace(
            self,
            tokens=self.tokens[which],
            choice_TK=self.choice_TK[which],
            weight_TK=self.weight_TK[which],
            dropped_TK=None if self.dropped_TK is None else self.dropped_TK[which],
            scores_TM=None if self.scores_TM is None else self.scores_TM[which],
        )

    def index_TK(self, num_experts: int) -> Tensor:
        """Experts that computed something, int64; N for nulls, dropped selections and nothing, as in `Routing`."""
        choice_TK = self.choice_TK.long()
        none_TK = (choice_TK < 0) | (choice_TK >= num_experts)
        if self.dropped_TK is not None:
            none_TK = none_TK | self.dropped_TK
        return choice_TK.masked_fill(none_TK, num_experts)


class RoutingLog(Protocol):
    """A trace, in memory or on disk."""

    @property
    def header(self) -> TraceHeader:
        """What was traced."""
        ...

    def rows(self, layers: Collection[int] | None = None) -> Iterator[Rows]:
        """Every row once, in batches of bounded size, each of one layer.

        Rows of a layer come in the order in which they were recorded; batches of different layers alternate.

        Args:
            layers: only these layers; None for all.
        """
        ...


@dataclass(frozen=True)
class Snapshot:
    """What one layer decided in a forward pass, copied on its device so that nothing changes or keeps it.

    Attributes:
        num_columns: M.
        choice_TK: selections in the router's order, in [0, M]; M where nothing was selected.
        weight_TK: their weights, float32.
        compared_TK: what the router compared to select them.
        dropped_TK: selections that found their expert full, or None.
        scores_TM: scores of all columns, float32, if asked for.
    """

    num_columns: int
    choice_TK: Tensor
    weight_TK: Tensor
    compared_TK: Tensor
    dropped_TK: Tensor | None
    scores_TM: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, routing: Routing, *, scores: bool = False) -> Snapshot:
        """Of a record; waits for no device."""
        columns = routing.num_columns
        choice_TK = routing.choice_TK.detach()
        compared_TK = routing.selection_TN.detach().gather(-1, choice_TK.clamp(max=columns - 1))
        small = torch.int16 if columns < torch.iinfo(torch.int16).max else torch.int32
        return cls(
            num_columns=columns,
            choice_TK=choice_TK.to(small, copy=True),
            weight_TK=routing.weight_TK.detach().to(torch.float32, copy=True),
            compared_TK=compared_TK,
            dropped_TK=None if routing.dropped_TK is None else routing.dropped_TK.detach().clone(),
            scores_TM=routing.scores_TN.detach().to(torch.float32, copy=True) if scores else None,
        )

    @torch.no_grad()
    def rows(self, layer: int, tokens: TokenColumns, kept_T: Tensor | None) -> Rows:
        """The rows on the CPU.

        Args:
            layer: index of the decoder layer.
            tokens: the tokens that are kept.
            kept_T: which of the tokens those are, on the CPU; None for all.
        """

        def take(values: Tensor) -> Tensor:
            return (values if kept_T is None else values[kept_T.to(values.device)]).cpu()

        choice_TK, weight_TK, compared_TK = take(self.choice_TK), take(self.weight_TK), take(self.compared_TK)
        dropped_TK = None if self.dropped_TK is None else take(self.dropped_TK)
        nothing_TK = choice_TK >= self.num_columns
        if nothing_TK.any():
            choice_TK = choice_TK.masked_fill(nothing_TK, NOTHING)
            weight_TK = weight_TK.masked_fill(nothing_TK, 0.0)
            compared_TK = compared_TK.masked_fill(nothing_TK, -torch.inf)
        # Most routers select in order.
        if not (compared_TK[:, :-1] >= compared_TK[:, 1:]).all():
            order_TK = compared_TK.argsort(dim=-1, descending=True, stable=True)
            choice_TK, weight_TK = choice_TK.gather(-1, order_TK), weight_TK.gather(-1, order_TK)
            dropped_TK = None if dropped_TK is None else dropped_TK.gather(-1, order_TK)
        scores_TM = None if self.scores_TM is None else take(self.scores_TM)
        return Rows(layer, tokens, choice_TK, weight_TK, dropped_TK, scores_TM)


def rows_of(layer: int, routing: Routing, tokens: TokenColumns, kept_T: Tensor | None, *, scores: bool = False) -> Rows:
    """The rows of one layer and forward pass.

    Args:
        layer: index of the decoder layer.
        routing: its record.
        tokens: the tokens that are kept.
        kept_T: which tokens of the record they are; None for all.
        scores: keep the scores of all columns.
    """
    return Snapshot.of(routing, scores=scores).rows(layer, tokens, kept_T)
