"""`TraceLookup`: the picks of a trace by document and position."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import TraceError
from moesaic.trace.header import TraceHeader
from moesaic.trace.rows import NOTHING, RoutingLog, Rows
from moesaic.trace.storage.file import TraceFile

_POSITIONS = 2**32


@dataclass(frozen=True)
class LayerPicks:
    """Picks of one layer, ordered by document and position; the fields of `Rows` with these names.

    Attributes:
        key_T: document * 2^32 + position, ascending.
    """

    key_T: Tensor
    choice_TK: Tensor
    weight_TK: Tensor | None
    dropped_TK: Tensor | None


class TraceLookup:
    """A trace in memory, to be read in any order.

    Takes, for each token and layer, 2 K bytes (4 K with 32,768 columns or more), 4 K more with weights and K more with
    drops, and 12 bytes for each token; while it is made, also 8 bytes for each token and layer.

    Args:
        log: the trace, read once.
        documents: only these documents; None for all. Of a `TraceFile` only their parts are read.
        weights: keep the weights.

    Attributes:
        header: of the trace.
        layers: picks by layer.

    Raises:
        TraceError: if the trace holds a token twice.
    """

    def __init__(self, log: RoutingLog, *, documents: Collection[int] | None = None, weights: bool = False) -> None:
        self.header: TraceHeader = log.header
        parts: dict[int, list[_Bare]] = {}
        keys: dict[int, list[Tensor]] = {}
        tokens: list[Tensor] = []
        first = min(self.header.layers, default=None)
        for rows in _rows(log, documents, weights=weights):
            keys.setdefault(rows.layer, []).append(_key(rows.tokens.document_T, rows.tokens.position_T))
            parts.setdefault(rows.layer, []).append(_bare(rows, weights=weights))
            if rows.layer == first:
                tokens.append(rows.tokens.token_T)
        self.layers: dict[int, LayerPicks] = {}
        self._token_T = torch.empty(0, dtype=torch.int32)
        for layer in sorted(parts):
            key_T, order_T = torch.cat(keys.pop(layer)).sort()
            self._check_single(layer, key_T)
            if layer == first:
                self._token_T = torch.cat(tokens)[order_T]
            elif first in self.layers and torch.equal(key_T, self.layers[first].key_T):
                key_T = self.layers[first].key_T  # one copy for all layers
            self.layers[layer] = _joined(key_T, order_T, parts.pop(layer))

    def _check_single(self, layer: int, key_T: Tensor) -> None:
        twice_T = key_T[1:] == key_T[:-1]
        if twice_T.any():
            key = int(key_T[1:][twice_T][0])
            raise TraceError(
                f"the trace holds document {key // _POSITIONS}, position {key % _POSITIONS} twice in layer {layer}, so "
                "that it can't be looked up; record the texts one by one"
            )

    def rows_of(self, layer: int, document_T: Tensor, position_T: Tensor) -> Tensor:
        """Where tokens stand in `layers[layer]`, int64.

        Raises:
            TraceError: naming a token that the trace does not hold.
        """
        picks = self.layers.get(layer)
        key_T = _key(document_T, position_T)
        held_T = torch.empty(0, dtype=torch.int64) if picks is None else picks.key_T
        row_T = torch.searchsorted(held_T, key_T).clamp(max=max(len(held_T) - 1, 0))
        missing_T = held_T[row_T] != key_T if len(held_T) else torch.ones_like(key_T, dtype=torch.bool)
        if missing_T.any():
            self._missing(layer, int(document_T[missing_T][0]), int(position_T[missing_T][0]))
        return row_T

    def token_T(self, row_T: Tensor) -> Tensor:
        """Token ids at rows of the first layer; -1 where they are not known."""
        return self._token_T[row_T]

    def _missing(self, layer: int, document: int, position: int) -> None:
        held_T = self.layers[layer].key_T if layer in self.layers else torch.empty(0, dtype=torch.int64)
        of_document_T = held_T[held_T // _POSITIONS == document]
        if len(of_document_T):
            reason = f"of that document it holds the positions up to {int(of_document_T[-1]) % _POSITIONS}"
        elif self.header.sample < 1:
            reason = f"it was recorded with sample = {self.header.sample:g}, and that document was left out"
        else:
            numbers = (held_T // _POSITIONS).unique()
            held = f"{int(numbers[0])} to {int(numbers[-1])}" if len(numbers) else "none"
            reason = f"it holds {len(numbers)} documents ({held})"
        raise TraceError(
            f"the trace has no picks for document {document}, position {position} (layer {layer}): {reason}; replay the "
            "texts that were recorded, and name their documents with `documents` if they come in another order"
        )


def _rows(log: RoutingLog, documents: Collection[int] | None, *, weights: bool) -> Iterator[Rows]:
    if isinstance(log, TraceFile):
        yield from log.rows(documents=documents, weights=weights, scores=False)
        return
    wanted_D = None if documents is None else torch.tensor(sorted(set(documents)), dtype=torch.int64)
    for rows in log.rows():
        if wanted_D is not None:
            rows = rows[torch.isin(rows.tokens.document_T, wanted_D)]
        if len(rows):
            yield rows


def _key(document_T: Tensor, position_T: Tensor) -> Tensor:
    return document_T.long() * _POSITIONS + position_T.long()


@dataclass(frozen=True)
class _Bare:
    choice_TK: Tensor
    weight_TK: Tensor | None
    dropped_TK: Tensor | None


def _bare(rows: Rows, *, weights: bool) -> _Bare:
    small = rows.choice_TK.dtype.itemsize <= 2 or int(rows.choice_TK.max()) <= torch.iinfo(torch.int16).max
    choice_TK = rows.choice_TK.to(torch.int16 if small else torch.int32)
    return _Bare(choice_TK, rows.weight_TK if weights else None, rows.dropped_TK)


def _joined(key_T: Tensor, order_T: Tensor, parts: list[_Bare]) -> LayerPicks:
    """Parts of one layer together in this order, as wide as the widest."""
    width = max(part.choice_TK.shape[1] for part in parts)

    def wide(values_TK: Tensor, fill: int) -> Tensor:
        return F.pad(values_TK, (0, width - values_TK.shape[1]), value=fill)

    choice_TK = torch.cat([wide(part.choice_TK, NOTHING) for part in parts])
    weights = [wide(part.weight_TK, 0) for part in parts if part.weight_TK is not None]
    dropped = [part.dropped_TK for part in parts]
    dropped_TK = None
    if any(mask_TK is not None for mask_TK in dropped):
        none_TK = [torch.zeros_like(part.choice_TK, dtype=torch.bool) for part in parts]
        masks = [none if mask is None else mask for mask, none in zip(dropped, none_TK, strict=True)]
        dropped_TK = torch.cat([wide(mask, 0) for mask in masks])[order_T]
    return LayerPicks(key_T, choice_TK[order_T], torch.cat(weights)[order_T] if weights else None, dropped_TK)
