"""Who is compared. To add one: its file, and a line in `contenders`."""

from __future__ import annotations

from moesaic.bench.contenders.base import Contender, Entry, LayerContender, LayerEntry, Unavailable
from moesaic.bench.contenders.dense import DenseChain, DenseWide
from moesaic.bench.contenders.kernels import kernel_contenders
from moesaic.bench.contenders.llama import LlamaCpp
from moesaic.bench.contenders.model import ModelContender, model_contenders
from moesaic.bench.contenders.stock import stock_contenders


def contenders(*, llama_cpp: str | None = None) -> list[Contender]:
    """All that there are, in the order of tables.

    Args:
        llama_cpp: an interpreter that has llama.cpp's package, if this one doesn't.
    """
    layers = [DenseChain(), DenseWide(), *kernel_contenders(), *stock_contenders()]
    return [*layers, *model_contenders(), LlamaCpp(llama_cpp)]


__all__ = [
    "Contender",
    "Entry",
    "LayerContender",
    "LayerEntry",
    "ModelContender",
    "Unavailable",
    "contenders",
]
