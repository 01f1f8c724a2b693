"""Activations inside kernels, and their derivatives, in float32.

`ACTIVATION` is one of `ACTIVATIONS`. Comparisons are written so that NaN stays NaN, as in torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = frozenset({"identity", "silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"})


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, alpha, limit):
    """act(z), without the gate's second factor."""
    if ACTIVATION == "silu":
        result = z * tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        result = 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(v)) = sigmoid(2 v), which loses no digits near zero.
        result = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "relu":
        result = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "relu2":
        positive = tl.where(z < 0.0, 0.0, z)
        result = positive * positive
    elif ACTIVATION == "clamped_swiglu":
        clamped = tl.where(z > limit, limit, z)
        result = clamped * tl.sigmoid(alpha * clamped)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        result = z
    return result


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr, alpha, limit):
    """d act(z) / dz; at kinks what torch's autograd gives."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(z)
        result = sigmoid * (1.0 + z * (1.0 - sigmoid))
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476))
        result = below + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        sigmoid = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * z * z)
        result = sigmoid + z * sigmoid * (1.0 - sigmoid) * slope
    elif ACTIVATION == "relu":
        result = tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        result = tl.where(z < 0.0, 0.0, 2.0 * z)
    elif ACTIVATION == "clamped_swiglu":
        clamped = tl.where(z > limit, limit, z)
        sigmoid = tl.sigmoid(alpha * clamped)
        result = tl.where(z > limit, 0.0, sigmoid * (1.0 + alpha * clamped * (1.0 - sigmoid)))
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        result = tl.full(z.shape, 1.0, tl.float32)
    return result


@triton.jit
def factor(up, ACTIVATION: tl.constexpr, limit):
    """What the activated gate is multiplied by."""
    result = up
    if ACTIVATION == "clamped_swiglu":
        result = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
    return result


@triton.jit
def factor_derivative(up, ACTIVATION: tl.constexpr, limit):
    """d factor(up) / d up."""
    result = tl.full(up.shape, 1.0, tl.float32)
    if ACTIVATION == "clamped_swiglu":
        result = tl.where((up > limit) | (up < -limit), 0.0, 1.0)
    return result
