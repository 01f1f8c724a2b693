"""What takes part in a comparison."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.bench.cases import Cell
from moesaic.bench.device import synchronise
from moesaic.bench.inputs import Call, LayerInputs


class Unavailable(Exception):
    """A contender can't take part on this machine or in this cell; the message says why."""


class Entry(ABC):
    """A contender, ready to run in one cell.

    Attributes:
        note: what a reader of its numbers should know.
        default: whether it is what its family does when nobody chooses.
    """

    note: str = ""
    default: bool = False

    @abstractmethod
    def outcome(self) -> dict[str, Tensor] | None:
        """What it computes on the first call, by name as in the reference, or None if it computes something else."""

    @abstractmethod
    def sample(self) -> float:
        """Run once and return seconds a call."""

    def facts(self) -> dict[str, object]:
        """More to be kept with its numbers."""
        return {}

    def close(self) -> None:  # noqa: B027 (most have nothing to let go of)
        """Let go of what it holds."""


class Contender(ABC):
    """Someone who takes part wherever it can.

    Attributes:
        name: unique; shown and chosen by --only and --skip.
        family: whom it stands for: "dense", "moesaic", "transformers" or "llama.cpp".
    """

    name: str
    family: str

    @abstractmethod
    def takes(self, cell: Cell) -> bool:
        """Whether it belongs into this cell at all."""


class LayerContender(Contender):
    """Someone who computes one layer of experts."""

    def takes(self, cell: Cell) -> bool:
        return not cell.kind.model

    @abstractmethod
    def enter(self, cell: Cell, inputs: LayerInputs) -> Entry:
        """Get ready.

        Raises:
            Unavailable: if it can't run here.
        """


class LayerEntry(Entry):
    """Calls of a function of the layer's inputs, timed one by one; what they leave is thrown away outside the clock.

    Args:
        cell: where it runs.
        calls: what it is called with, one after the other.
        forward: gives the output y_TD.
        note: see `Entry`.
    """

    def __init__(self, cell: Cell, calls: list[Call], forward: Callable[[Call], Tensor], note: str = "") -> None:
        self._cell, self._calls, self._forward, self.note = cell, calls, forward, note

    def outcome(self) -> dict[str, Tensor] | None:
        call = self._calls[0]
        forget_gradients(call)
        y_TD = self._run(call)
        found = {"output": y_TD.detach()}
        if self._cell.kind.backward:
            missing = [name for name, leaf in call.leaves.items() if leaf.grad is None]
            if missing:
                raise RuntimeError(f"no gradient of {', '.join(missing)}")
            found |= {name: leaf.grad for name, leaf in call.leaves.items() if leaf.grad is not None}
        forget_gradients(call)
        return found

    def sample(self) -> float:
        if self._cell.kind.backward:
            # A training step follows another: what that one freed is at hand. Memory that lies idle while others have
            # their turn goes back to the system, or from a virtual machine to its host, and is slow to come back.
            self._timed(self._calls[-1])
        return sum(self._timed(call) for call in self._calls) / len(self._calls)

    def _timed(self, call: Call) -> float:
        synchronise(self._cell.device)
        started = time.perf_counter()
        y_TD = self._run(call)
        synchronise(self._cell.device)
        seconds = time.perf_counter() - started
        del y_TD
        forget_gradients(call)
        return seconds

    def _run(self, call: Call) -> Tensor:
        with torch.set_grad_enabled(self._cell.kind.backward):
            y_TD = self._forward(call)
            if self._cell.kind.backward:
                y_TD.backward(call.upstream_TD)
        return y_TD


def forget_gradients(call: Call) -> None:
    """Drop all gradients, so that the next backward allocates them anew."""
    for leaf in call.leaves.values():
        leaf.grad = None
