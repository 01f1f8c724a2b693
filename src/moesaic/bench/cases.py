"""What can be measured: the cases, and one cell of the table that they span with shapes, types, tokens and threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moesaic.bench.shapes import DTYPES, Shape
from moesaic.errors import ConfigError


@dataclass(frozen=True)
class Case:
    """One kind of measurement.

    Attributes:
        name: on the command line.
        says: what it measures, for a person.
        tokens: defaults of --tokens.
        backward: whether gradients are computed.
        cold: whether calls go through sets of weights that do not fit the cache, as the layers of a model do.
        model: whether a whole model runs instead of a layer.
        timed: whether samples are seconds; otherwise they are bytes.
        dense: the contender that ratios to a dense layer refer to.
    """

    name: str
    says: str
    tokens: tuple[int, ...]
    backward: bool = False
    cold: bool = False
    model: bool = False
    timed: bool = True
    dense: str = "dense-chain"


CASES = {
    case.name: case
    for case in (
        Case("forward", "experts forward, the same weights in every call", (256, 2048)),
        Case("forward-backward", "experts forward and backward, with all gradients", (2048,), backward=True),
        Case("prefill", "experts forward over a prompt, weights not in the cache", (512,), cold=True),
        Case(
            "decode", "experts forward of a few tokens, weights not in the cache", (1, 4), cold=True, dense="dense-wide"
        ),
        Case("memory", "peak memory of a step forward and backward", (2048,), backward=True, timed=False),
        Case("model-prefill", "a whole model reads a prompt", (512,), model=True, dense="dense-model"),
        Case("model-decode", "a whole model writes after a prompt", (32,), cold=True, model=True, dense="dense-model"),
    )
}


@dataclass(frozen=True)
class Cell:
    """One comparison: everything in it runs in turns in one process.

    Attributes:
        case: name of the case.
        shape: the layer, or each layer of the model.
        dtype: name of the type of weights and tokens.
        tokens: T; for model cases the tokens of the prompt.
        threads: of torch and of what is compared with it; 0 on an accelerator.
        routing: how picks spread over experts.
        device: where.
    """

    case: str
    shape: Shape
    dtype: str
    tokens: int
    threads: int
    routing: str
    device: str

    @property
    def kind(self) -> Case:
        """The case."""
        return CASES[self.case]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of weights and tokens."""
        return DTYPES[self.dtype]

    @property
    def label(self) -> str:
        """Names it for a person, and uniquely within a file of results."""
        threads = f", {self.threads} thread{'s' * (self.threads != 1)}" if self.threads else ""
        tokens = f"{self.tokens:,} token{'s' * (self.tokens != 1)}"
        routing = "" if self.routing == "balanced" else f", {self.routing}"
        return f"{self.case}: {self.shape.name}, {self.dtype}, {tokens}{threads}{routing}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "shape": self.shape.name}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cell:
        """The inverse of `to_dict`."""
        return cls(**{**values, "shape": Shape.parse(values["shape"])})


def case_named(name: str) -> Case:
    """The case.

    Raises:
        ConfigError: if there is none of this name.
    """
    if name not in CASES:
        raise ConfigError("--case", name, "is not a case", f"choose from {', '.join(CASES)}")
    return CASES[name]


def cells(
    cases: Sequence[Case],
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    *,
    tokens: Sequence[int] | None,
    threads: Sequence[int],
    routing: str,
    device: str,
) -> list[Cell]:
    """All cells, ordered so that those with the same weights follow each other.

    Args:
        cases: what to measure.
        shapes: layers.
        dtypes: names of types.
        tokens: T, or None for the defaults of each case.
        threads: numbers of threads.
        routing: "balanced" or "skewed".
        device: where.
    """
    return [
        Cell(case.name, shape, dtype, count, number, routing, device)
        for shape in shapes
        for dtype in dtypes
        for case in cases
        for count in tokens or case.tokens
        for number in (threads if device == "cpu" else (0,))
    ]
