"""What whoever records says of the tokens: their domain and their turn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
