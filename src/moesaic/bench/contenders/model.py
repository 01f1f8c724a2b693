"""Whole models under transformers' `generate`: its implementations of experts, ours, and a dense model."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.bench.cases import Cell
from moesaic.bench.contenders.base import Contender, Entry, Unavailable
from moesaic.bench.contenders.stock import IMPLEMENTATIONS, refusal
from moesaic.bench.models import SINGLE_TOKENS, BenchModel, Generated, decoded_logits, generate
from moesaic.hf.experts import IMPLEMENTATION
from moesaic.infer.decode import fast_decoding
from moesaic.layer.kernels.native import decode

Mode = Callable[[PreTrainedModel], AbstractContextManager[object]]


class ModelContender(Contender):
    """Someone who runs a whole model."""

    def takes(self, cell: Cell) -> bool:
        return cell.kind.model

    @abstractmethod
    def enter(self, cell: Cell, model: BenchModel) -> Entry:
        """Get ready.

        Raises:
            Unavailable: if it can't run here.
        """


class ModelEntry(Entry):
    """Something that generates.

    Args:
        cell: where it runs.
        model: what is shared.
    """

    def __init__(self, cell: Cell, model: BenchModel) -> None:
        self._cell, self._prompt, self._new_tokens = cell, model.prompt(cell), model.size.new_tokens
        self._tokens: list[int] = []

    @abstractmethod
    def logits(self, prompt: list[int], single: int) -> Tensor:
        """Logits after the prompt, whose last `single` tokens are given one by one."""

    @abstractmethod
    def generate(self, prompt: list[int], new_tokens: int) -> Generated:
        """Greedy tokens."""

    def outcome(self) -> dict[str, Tensor] | None:
        return {"logits": self.logits(self._prompt, SINGLE_TOKENS if self._cell.kind.cold else 0)}

    def sample(self) -> float:
        if not self._cell.kind.cold:
            return self.generate(self._prompt, 1).first
        generated = self.generate(self._prompt, self._new_tokens)
        self._tokens = generated.tokens
        return generated.seconds_a_token

    def facts(self) -> dict[str, object]:
        return {"tokens": self._tokens} if self._tokens else {}


class StockModel(ModelContender):
    """The stock model in some mode.

    Args:
        name: of the contender.
        family: of the contender.
        mode: what to enter around each use of the model; not timed.
        refuses: the reason why it can't run in a cell.
    """

    def __init__(
        self, name: str, family: str, mode: Mode, refuses: Callable[[Cell], str | None] = lambda cell: None
    ) -> None:
        self.name, self.family, self._mode, self._refuses = name, family, mode, refuses

    def enter(self, cell: Cell, model: BenchModel) -> Entry:
        reason = self._refuses(cell)
        if reason is not None:
            raise Unavailable(reason)
        return _StockEntry(cell, model, model.stock, self._mode)


class DenseModel(ModelContender):
    """A dense model that has as many parameters as the other uses for a token."""

    name, family = "dense-model", "dense"

    def enter(self, cell: Cell, model: BenchModel) -> Entry:
        return _DenseEntry(cell, model, model.dense(cell), _as_it_is)


class _StockEntry(ModelEntry):
    def __init__(self, cell: Cell, model: BenchModel, network: PreTrainedModel, mode: Mode) -> None:
        super().__init__(cell, model)
        self._network, self._mode = network, mode

    def logits(self, prompt: list[int], single: int) -> Tensor:
        with self._mode(self._network):
            return decoded_logits(self._network, prompt, single)

    def generate(self, prompt: list[int], new_tokens: int) -> Generated:
        with self._mode(self._network):
            return generate(self._network, prompt, new_tokens)


class _DenseEntry(_StockEntry):
    def outcome(self) -> None:
        return None


@contextlib.contextmanager
def experts_implementation(name: str, model: PreTrainedModel) -> Iterator[None]:
    """The model with an `experts_implementation`, and afterwards with the one it had, or eager if none was chosen."""
    before = model.config._experts_implementation or "eager"
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextlib.contextmanager
def _as_it_is(model: PreTrainedModel) -> Iterator[None]:
    yield


def _no_fast_decoding(cell: Cell) -> str | None:
    if torch.device(cell.device).type != "cpu":
        return "is for CPU"
    return None if decode.available() else "the native library was not built"


def model_contenders() -> list[Contender]:
    """Ours, then one for each implementation of transformers."""
    return [
        DenseModel(),
        StockModel("moesaic:experts", "moesaic", partial(experts_implementation, IMPLEMENTATION)),
        StockModel("moesaic:fast_decoding", "moesaic", fast_decoding, _no_fast_decoding),
        *(
            StockModel(
                f"transformers:{name}",
                "transformers",
                partial(experts_implementation, name),
                partial(refusal, name),
            )
            for name in IMPLEMENTATIONS
        ),
    ]
