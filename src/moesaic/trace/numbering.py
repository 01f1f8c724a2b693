"""Which document, position and place each token of a forward pass has."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.layer import RoutingContext
from moesaic.trace.rows import NOTHING, TokenColumns


class DocumentNumbering:
    """Numbers documents in the order in which they arrive.

    A row of a batch is a document, or several where positions start anew inside it (packing). A row whose positions go on
    where the same row of the last forward pass ended continues that document, as in generation with a cache.

    Args:
        first: number of the first document.
    """

    def __init__(self, first: int = 0) -> None:
        self._next = first
        self._last_document_B = torch.empty(0, dtype=torch.int64)
        self._last_position_B = torch.empty(0, dtype=torch.int64)
        self._last_place_B = torch.empty(0, dtype=torch.int64)

    @property
    def next_document(self) -> int:
        """Number of the document that comes next."""
        return self._next

    def columns(
        self,
        context: RoutingContext,
        *,
        domain: int = 0,
        turn_T: Tensor | None = None,
        num_tokens: int | None = None,
    ) -> TokenColumns:
        """The real tokens of a forward pass.

        Args:
            context: of the forward pass.
            domain: number of their domain.
            turn_T: turn of every token, padding included, if known.
            num_tokens: tokens of the pass, padding included; None to read it from the layers, which have run then.
        """
        batch = context.batch_size
        if num_tokens is None:
            num_tokens = next(iter(context.records.values())).index_TK.shape[0]
        length = num_tokens // batch
        real_BL = _grid(context.mask_T, batch, length, torch.bool, default=True)
        place_BL = real_BL.cumsum(-1) - 1
        if context.position_T is not None:
            position_BL = _grid(context.position_T, batch, length, torch.int64)
        else:
            position_BL = place_BL
        document_BL, place_BL, position_BL = self._documents(real_BL, place_BL, position_BL, context.position_T is None)
        token_BL = _grid(context.token_ids_T, batch, length, torch.int32, default=NOTHING)
        modality_BL = _grid(context.modality_T, batch, length, torch.int8, default=NOTHING)
        turn_BL = _grid(turn_T, batch, length, torch.int16, default=NOTHING)
        return TokenColumns(
            document_T=document_BL[real_BL],
            position_T=position_BL[real_BL].to(torch.int32),
            place_T=place_BL[real_BL].to(torch.int32),
            token_T=token_BL[real_BL],
            domain_T=torch.full((int(real_BL.sum()),), domain, dtype=torch.int16),
            turn_T=turn_BL[real_BL],
            modality_T=modality_BL[real_BL],
        )

    def _documents(
        self, real_BL: Tensor, place_BL: Tensor, position_BL: Tensor, no_positions: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Documents, and places and positions that count on from the last forward pass where a document goes on."""
        batch, length = real_BL.shape
        first_B = real_BL.to(torch.int8).argmax(-1)
        row_B = torch.arange(batch)
        goes_on_B = torch.zeros(batch, dtype=torch.bool)
        if len(self._last_document_B) == batch and not no_positions:
            goes_on_B = (position_BL[row_B, first_B] == self._last_position_B + 1) & (self._last_position_B >= 0)
        # A document starts where a position is not the one after the last real token's.
        before_BL = torch.cat([torch.full((batch, 1), -2), position_BL[:, :-1]], dim=1)
        starts_BL = real_BL & (position_BL != before_BL + 1)
        starts_BL[row_B, first_B] = real_BL.any(-1) & ~goes_on_B
        number_BL = starts_BL.flatten().cumsum(0).view(batch, length) + self._next - 1
        if goes_on_B.any():
            begun_BL = starts_BL.cumsum(-1) > 0
            continued_BL = goes_on_B.unsqueeze(-1) & ~begun_BL
            number_BL = torch.where(continued_BL, self._last_document_B.unsqueeze(-1), number_BL)
            place_BL = place_BL + torch.where(goes_on_B, self._last_place_B + 1, 0).unsqueeze(-1)
        self._next += int(starts_BL.sum())
        last_B = (length - 1) - real_BL.flip(-1).to(torch.int8).argmax(-1)
        some_B = real_BL.any(-1)
        self._last_document_B = number_BL[row_B, last_B]
        self._last_position_B = torch.where(some_B, position_BL[row_B, last_B], -1)
        self._last_place_B = torch.where(some_B, place_BL[row_B, last_B], -1)
        return number_BL, place_BL, position_BL


def _grid(values_T: Tensor | None, batch: int, length: int, dtype: torch.dtype, default: int | bool = 0) -> Tensor:
    """Values of all tokens as (B, L) on the CPU, `default` if there are none."""
    if values_T is None:
        return torch.full((batch, length), default, dtype=dtype)
    return values_T.detach().to(device="cpu", dtype=dtype).view(batch, length)
