"""Dense layers of the same size: what the rows or the bytes of a layer of experts would cost without experts."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from moesaic.bench.cases import Cell
from moesaic.bench.contenders.base import Entry, LayerContender, LayerEntry
from moesaic.bench.inputs import Call, LayerInputs, gated_weights


class _Dense(LayerContender):
    family = "dense"

    def enter(self, cell: Cell, inputs: LayerInputs) -> Entry:
        return _DenseEntry(cell, [self.call(call) for call in inputs.calls], dense_forward)

    @abstractmethod
    def call(self, call: Call) -> Call:
        """The inputs of the dense layer; its weights have no axis of experts."""


class DenseChain(_Dense):
    """All S = T*K rows through the matrices of one expert: the same FLOPs and rows, nothing to sort or to scatter."""

    name = "dense-chain"

    def call(self, call: Call) -> Call:
        """S rows, and the first expert's weights."""
        return _dense_call(call, call.index_TK.numel(), call.weights.up_NHD[0], call.weights.down_NDF[0])


class DenseWide(_Dense):
    """T rows through one layer of width K*F: the dense layer of equal active size, in few large products.

    For one token it reads as many bytes of weights as the experts do.
    """

    name = "dense-wide"

    def call(self, call: Call) -> Call:
        """T rows, and weights as wide as the picked experts together."""
        picks, (_, hidden, width) = call.index_TK.shape[1], call.weights.down_NDF.shape
        up_HD = call.weights.up_NHD[:picks].reshape(-1, hidden)
        bound = math.sqrt(3 / (picks * width))
        down_DF = torch.empty(hidden, picks * width, dtype=up_HD.dtype, device=up_HD.device).uniform_(-bound, bound)
        return _dense_call(call, call.index_TK.shape[0], up_HD, down_DF)


class _DenseEntry(LayerEntry):
    def outcome(self) -> None:
        return None


def dense_forward(call: Call) -> Tensor:
    """down(silu(gate(x)) * up(x))."""
    hidden = call.weights.activate(nn.functional.linear(call.x_TD, call.weights.up_NHD))
    return nn.functional.linear(hidden, call.weights.down_NDF)


def _dense_call(call: Call, rows: int, up_HD: Tensor, down_DF: Tensor) -> Call:
    backward = call.x_TD.requires_grad
    repeats = -(-rows // call.x_TD.shape[0])
    rows_SD, upstream_SD = (
        source.detach().repeat(repeats, 1)[:rows].clone() for source in (call.x_TD, call.upstream_TD)
    )
    weights = gated_weights(up_HD.detach().requires_grad_(backward), down_DF.detach().requires_grad_(backward))
    return Call(weights, rows_SD.requires_grad_(backward), call.index_TK, call.weight_TK, upstream_SD)
