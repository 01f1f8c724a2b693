"""Counting the tokens that go through models, whatever decodes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class Positions:
    """What has been counted so far.

    Attributes:
        count: tokens of all rows, padding and weak passes among them.
    """

    def __init__(self) -> None:
        self.count = 0

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.count += positions_in(args, kwargs)


def positions_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The tokens of a forward pass with these arguments."""
    given: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
    return kwargs["inputs_embeds"].shape[:2].numel() if given is None else given.numel()


@contextlib.contextmanager
def count_positions(*models: nn.Module) -> Iterator[Positions]:
    """Count the tokens of all forward passes that begin inside the block.

    Ordinary decoding of T new tokens after P computes P + T - 1 positions for each row, self-contrast twice as many.

    Args:
        models: causal language models; one that is given twice counts once.
    """
    counted = Positions()
    handles = [
        model.register_forward_pre_hook(counted._before, with_kwargs=True)
        for model in {id(model): model for model in models}.values()
    ]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()
