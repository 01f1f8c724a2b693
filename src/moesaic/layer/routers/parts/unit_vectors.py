"""Cosines between tokens and experts with a learned sharpness: what the routers on the unit sphere share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.layer.routers.base import fill_buffer
from moesaic.layer.routers.parts.inputs import linear

# Vectors shorter than this are not stretched to length 1: a token of zeros has cosine 0 and a finite gradient.
_SHORTEST = 1e-6


def unit(x_TD: Tensor) -> Tensor:
    """Rows divided by their Euclidean length."""
    return F.normalize(x_TD, dim=-1, eps=_SHORTEST)


def cosine(x_TD: Tensor, weight_ND: Tensor) -> Tensor:
    """Cosine of the angle between every token and every expert, (T, N)."""
    return linear(unit(x_TD), unit(weight_ND))


def sharpness(log_scale_1: Tensor, largest: float) -> Tensor:
    """1 / temperature, from its logarithm, at most `largest`."""
    return log_scale_1.clamp(max=math.log(largest)).exp()


def init_orthogonal(tensor: Tensor, gain: float = 1.0) -> None:
    """Orthogonal rows, or columns where there are more rows than columns, unless a checkpoint has filled the tensor."""
    if tensor.dtype in (torch.float32, torch.float64):
        nn.init.orthogonal_(tensor, gain=gain)
        return
    # The decomposition does not exist for half precision.
    exact = torch.empty_like(tensor, dtype=torch.float32, requires_grad=False)
    nn.init.orthogonal_(exact, gain=gain)
    fill_buffer(tensor, exact)
