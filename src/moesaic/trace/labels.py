"""What whoever records says of the tokens: their domain, their turn, and the documents in which they stand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import RoutingContext
from moesaic.trace.rows import NOTHING


class Labels:
    """Domains and turns of what runs inside a block; a trace in the making derives from it."""

    def __init__(self) -> None:
        self._domain = ""
        self._domains = [""]
        self._turn: int | Tensor = NOTHING
        self._documents: Tensor | None = None

    @contextlib.contextmanager
    def domain(self, name: str) -> Iterator[None]:
        """The forward passes inside this block are of the domain `name`."""
        before, self._domain = self._domain, name
        try:
            yield
        finally:
            self._domain = before

    @contextlib.contextmanager
    def turn(self, turn: int | Tensor) -> Iterator[None]:
        """The forward passes inside this block are of this turn of a conversation.

        Args:
            turn: number from 0; or that of every token, (B, S) as the ids. Tokens that are generated after those, with a
                cache, are of the turn of the last one.
        """
        before, self._turn = self._turn, turn
        try:
            yield
        finally:
            self._turn = before

    @contextlib.contextmanager
    def documents(self, document_BS: Tensor) -> Iterator[None]:
        """The forward passes inside this block read packed documents of which the model is not told.

        Without it a row of a batch is one document, unless positions start anew inside it.

        Args:
            document_BS: any number of each token's document, (B, S) as the ids; -1 in padding. Where it changes along a
                row another document starts.
        """
        before, self._documents = self._documents, document_BS
        try:
            yield
        finally:
            self._documents = before

    def _placed(self, context: RoutingContext, num_tokens: int) -> RoutingContext:
        """The context with the documents that were given, if they were."""
        if self._documents is None:
            return context
        document_BS = self._documents
        batch, length = context.batch_size, num_tokens // context.batch_size
        if document_BS.shape != (batch, length):
            raise ConfigError(
                "documents",
                tuple(document_BS.shape),
                f"is not the shape of the ids ({batch}, {length})",
                "give one for every token",
            )
        place_BS = torch.arange(length, device=document_BS.device).expand(batch, -1)
        starts_BS = torch.ones_like(document_BS, dtype=torch.bool)
        starts_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
        position_BS = place_BS - torch.where(starts_BS, place_BS, 0).cummax(-1).values
        real_T = (document_BS >= 0).reshape(-1)
        if context.mask_T is not None:
            real_T = real_T.to(context.mask_T.device) & context.mask_T
        return replace(context, position_T=position_BS.reshape(-1), mask_T=real_T)

    def _domain_number(self, name: str) -> int:
        if name not in self._domains:
            self._domains.append(name)
        return self._domains.index(name)

    def _turns(self, context: RoutingContext, num_tokens: int) -> Tensor | None:
        """Turns of all tokens of a forward pass, padding included, on the CPU."""
        if isinstance(self._turn, int):
            return None if self._turn == NOTHING else torch.full((num_tokens,), self._turn, dtype=torch.int16)
        turn_BS = self._turn.to("cpu", torch.int16)
        batch, length = context.batch_size, num_tokens // context.batch_size
        if turn_BS.dim() == 2 and len(turn_BS) == batch:
            if turn_BS.shape[1] == length:
                return turn_BS.reshape(-1)
            # Prefilled in chunks there would be no telling which tokens these are.
            if length == 1:
                return turn_BS[:, -1].clone()
        raise ConfigError(
            "turn", tuple(turn_BS.shape), f"is not the shape of the ids ({batch}, {length})", "give one for every token"
        )
