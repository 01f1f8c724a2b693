"""Random layers, tokens and picks; the same for everyone who is compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic.bench.cases import Cell
from moesaic.bench.device import cache_bytes
from moesaic.bench.shapes import Shape
from moesaic.layer.kernels import ExpertWeights, FusedActivation

ROUTINGS = ("balanced", "skewed")

# A call that follows must find nothing of an earlier one in the cache.
CACHES_APART = 4
MOST_WEIGHT_BYTES = 2 << 30

SWIGLU = FusedActivation("silu", gated=True)


def gated_weights(up: Tensor, down: Tensor) -> ExpertWeights:
    """Weights of experts, or of a dense layer, with SwiGLU between the projections."""
    return ExpertWeights(up, down, SWIGLU, fused=SWIGLU)


@dataclass
class Call:
    """What one call of the experts gets. All tensors that can have a gradient are leaves.

    Attributes:
        weights: of the layer; `up_NHD` and `down_NDF` are parameters.
        x_TD: tokens.
        index_TK: picks.
        weight_TK: their weights.
        upstream_TD: gradient of the output.
    """

    weights: ExpertWeights
    x_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    upstream_TD: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        """All that gets a gradient, by name."""
        return {
            "x": self.x_TD,
            "weight": self.weight_TK,
            "up": self.weights.up_NHD,
            "down": self.weights.down_NDF,
        }


@dataclass
class LayerInputs:
    """The calls that one sample consists of, one for each set of weights.

    Attributes:
        calls: in their order.
        touched: experts that have rows, mean over the calls.
    """

    calls: list[Call]
    touched: float


class Layers:
    """Keeps the random weights of the last shape, type and device, since filling gigabytes takes seconds."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._of: tuple[Shape, torch.dtype, str] | None = None
        self._sets: list[tuple[nn.Parameter, nn.Parameter]] = []

    def clear(self) -> None:
        """Let go of the weights."""
        self._of, self._sets = None, []

    def inputs(self, cell: Cell) -> LayerInputs:
        """Weights, tokens and picks of a cell; the same for the same seed."""
        generator = torch.Generator().manual_seed(self._seed)
        indices = [picks(cell, generator) for _ in range(64)]
        touched = [index_TK.unique().numel() for index_TK, _ in indices]
        sets = number_of_sets(cell, sum(touched) / len(touched)) if cell.kind.cold else 1
        weights = self._weights(cell, sets)
        calls = []
        for (up_NHD, down_NDF), (index_TK, weight_TK) in zip(weights, indices, strict=False):
            x_TD, upstream_TD = (
                torch.randn(cell.tokens, cell.shape.hidden, generator=generator).to(cell.device, cell.torch_dtype)
                for _ in range(2)
            )
            calls.append(
                Call(
                    gated_weights(up_NHD, down_NDF),
                    x_TD.requires_grad_(cell.kind.backward),
                    index_TK.to(cell.device),
                    weight_TK.to(cell.device, cell.torch_dtype).requires_grad_(cell.kind.backward),
                    upstream_TD,
                )
            )
        return LayerInputs(calls, sum(touched[:sets]) / sets)

    def _weights(self, cell: Cell, count: int) -> list[tuple[nn.Parameter, nn.Parameter]]:
        of = (cell.shape, cell.torch_dtype, cell.device)
        if of != self._of:
            self._sets, self._of = [], of
        while len(self._sets) < count:
            # Uniform, since it is much faster to draw; the variance keeps the size of the rows.
            generator = torch.Generator(cell.device).manual_seed(self._seed + len(self._sets))
            shape = cell.shape
            sizes = ((shape.experts, 2 * shape.width, shape.hidden), (shape.experts, shape.hidden, shape.width))
            pair = []
            for size in sizes:
                packed = torch.empty(size, dtype=cell.torch_dtype, device=cell.device)
                bound = math.sqrt(3 / size[-1])
                pair.append(nn.Parameter(packed.uniform_(-bound, bound, generator=generator)))
            self._sets.append((pair[0], pair[1]))
        return self._sets[:count]


def picks(cell: Cell, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Picks and their weights: the K largest of a softmax of random logits, weights summing to 1.

    "skewed" adds to every expert's logit one of a normal distribution of twice the spread, as of a router that has
    collapsed a little: a few experts get most of the rows, many get none.
    """
    logits_TN = torch.randn(cell.tokens, cell.shape.experts, generator=generator)
    if cell.routing == "skewed":
        logits_TN = logits_TN + 2 * torch.randn(cell.shape.experts, generator=generator)
    weight_TK, index_TK = logits_TN.softmax(-1).topk(cell.shape.picks)
    return index_TK, weight_TK / weight_TK.sum(-1, keepdim=True)


def number_of_sets(cell: Cell, touched: float) -> int:
    """How many layers the calls of a cold case go through.

    So many that the weights they read are four times the cache, but no more than 2 GiB in all.
    """
    expert_bytes = cell.shape.expert_parameters * cell.torch_dtype.itemsize
    wanted = math.ceil(CACHES_APART * cache_bytes(cell.device) / (touched * expert_bytes))
    most = MOST_WEIGHT_BYTES // (cell.shape.experts * expert_bytes)
    return max(1, min(wanted, most, 64))
