"""Who is compared. To add one: its file, and a line in `contenders`."""

from __future__ import annotations

from moesaic.bench.contenders.base import Contender, Entry, LayerContender, LayerEntry, Unavailable
from moesaic.bench.contenders.dense import DenseChain, DenseWide
from moesaic.bench.contenders.kernels import kernel_contenders
from moesaic.bench.contenders.stock import stock_contenders


def contenders() -> list[Contender]:
    """All that there are, in the order of tables."""
    return [DenseChain(), DenseWide(), *kernel_contenders(), *stock_contenders()]


__all__ = ["Contender", "Entry", "LayerContender", "LayerEntry", "Unavailable", "contenders"]
