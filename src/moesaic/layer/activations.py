"""Activation functions of experts, under the names that HF configs use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2 (Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": relu_squared,
}


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """GLU: act(gate) * up, with gate the first and up the second half of the last axis (arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up


def swiglu_double(rows: Tensor) -> Tensor:
    """a * swish(b) * u, with a, b and u the thirds of the last axis: OpenMoE's feed-forward networks (arXiv 2402.01739).

    Their first matrix is that of a SwiGLU of its own, (a, b), by which the output u of the second one is multiplied.
    """
    linear, gate, up = rows.chunk(3, dim=-1)
    return linear * F.silu(gate) * up


def clamped_swiglu(gate_up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """gpt-oss's gate: g * sigmoid(alpha * g) * (u + 1), with g clamped above and u on both sides at `limit`."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    up = up.clamp(min=-limit, max=limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)
