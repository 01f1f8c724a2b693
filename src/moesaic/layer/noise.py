"""Random numbers for routers as a pure function of a seed: the same on every device, and again at recomputation.

A generator with a state would make a router impure: a layer that activation checkpointing runs twice would route tokens
to other experts the second time. Here each number is a hash of (seed, layer, stream, index).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.layer.record import RoutingContext

# Multipliers of the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), as signed 64-bit integers.
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_STEP = 0x9E3779B97F4A7C15 - 2**64


def uniform(context: RoutingContext | None, layer: int, shape: Sequence[int], *, stream: int, like: Tensor) -> Tensor:
    """Independent numbers in (0, 1) of a shape.

    Args:
        context: whose `seed` decides; without one the seed is 0.
        layer: index of the layer that draws.
        shape: of the result.
        stream: tells apart what one layer draws for different purposes.
        like: dtype and device of the result.
    """
    count = 1
    for size in shape:
        count *= size
    seed = torch.zeros((), dtype=torch.int64, device=like.device)
    if context is not None and context.seed is not None:
        seed = context.seed.to(like.device)
    key = _mix(_mix(seed + _STEP) + _wrap((1 + layer) * _STEP + stream))
    hashed = _mix(key + torch.arange(count, device=like.device) * _STEP)
    # 52 bits fit a double exactly; the half keeps 0 and 1 out.
    unit = ((hashed >> 12) & (2**52 - 1)).to(torch.float64).add(0.5).mul(2.0**-52)
    # Rounded to float32, the largest would be 1.
    return unit.to(like.dtype).clamp(max=1 - torch.finfo(like.dtype).eps / 2).view(*shape)


def normal(context: RoutingContext | None, layer: int, shape: Sequence[int], *, stream: int, like: Tensor) -> Tensor:
    """Independent standard normal numbers; arguments as for `uniform`."""
    unit = uniform(context, layer, shape, stream=stream, like=like)
    return torch.special.ndtri(unit)


def gumbel(context: RoutingContext | None, layer: int, shape: Sequence[int], *, stream: int, like: Tensor) -> Tensor:
    """Independent standard Gumbel numbers; arguments as for `uniform`."""
    return -torch.log(-torch.log(uniform(context, layer, shape, stream=stream, like=like)))


def hash_of(*parts: Tensor) -> Tensor:
    """A 64-bit hash of each tuple of integers; int64 tensors, which are broadcast against each other."""
    hashed = torch.zeros((), dtype=torch.int64, device=parts[0].device)
    for part in parts:
        hashed = _mix(hashed + part + _STEP)
    return hashed


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _wrap(number: int) -> int:
    """A Python integer as int64 arithmetic would leave it; torch refuses larger ones."""
    return (number + 2**63) % 2**64 - 2**63


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; the one of signed integers would copy the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
