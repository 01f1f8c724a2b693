"""The structures and functions of csrc/decode.h, field by field."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass

from moesaic.layer.kernels.native import library

LINEARS_MOST = 4


class Linears(ctypes.Structure):
    """Up to four projections of one input: `moesaic_linears`."""

    _fields_ = (
        ("type", c_int64),
        ("count", c_int64),
        ("inputs", c_int64),
        ("weight", c_void_p * LINEARS_MOST),
        ("stride", c_int64 * LINEARS_MOST),
        ("out", c_int64 * LINEARS_MOST),
        ("bias", c_void_p * LINEARS_MOST),
    )


class Norm(ctypes.Structure):
    """RMSNorm: `moesaic_norm`."""

    _fields_ = (("type", c_int64), ("width", c_int64), ("weight", c_void_p), ("epsilon", c_double))


class Attention(ctypes.Structure):
    """Projections, norms on heads, rotation and output of attention: `moesaic_attention`."""

    _fields_ = (
        ("projections", Linears),
        ("output", Linears),
        ("q_norm", Norm),
        ("k_norm", Norm),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("width", c_int64),
        ("scaling", c_double),
    )


class AttentionHalf(ctypes.Structure):
    """Norms and attention of a decoder layer: `moesaic_attention_half`."""

    _fields_ = (("before", Norm), ("after", Norm), ("attention", Attention))


class Place(ctypes.Structure):
    """Where keys, values and rotations of one step are: `moesaic_place`."""

    _fields_ = (
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("rotation_stride", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("length", c_int64),
        ("mask", c_void_p),
        ("mask_stride", c_int64),
    )


class Router(ctypes.Structure):
    """A top-k router: `moesaic_router`."""

    _fields_ = (
        ("logits", Linears),
        ("top_k", c_int64),
        ("sigmoid", c_int64),
        ("over_selected", c_int64),
        ("normalize", c_int64),
        ("round_logits", c_int64),
        ("round_scores", c_int64),
        ("epsilon", c_double),
        ("scale", c_double),
    )


class MoEHalf(ctypes.Structure):
    """Router and experts of a decoder layer: `moesaic_moe_half`."""

    _fields_ = (("router", Router), ("experts", library.ExpertsCall), ("num_experts", c_int64))


@dataclass(frozen=True)
class Calls:
    """The functions, with their argument types set."""

    linears: Callable[..., int]
    norm: Callable[..., None]
    attention: Callable[..., int]
    router: Callable[..., int]
    attention_half: Callable[..., int]
    moe_half: Callable[..., int]


@functools.cache
def calls() -> Calls:
    """The functions of the library that was built."""
    loaded = library.loaded()
    loaded.moesaic_linears_run.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64]
    loaded.moesaic_linears_run.restype = ctypes.c_long
    loaded.moesaic_norm_rows.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_void_p]
    loaded.moesaic_norm_rows.restype = None
    loaded.moesaic_attention_step.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64]
    loaded.moesaic_router_step.argtypes = [
        *[c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64],
        *[c_void_p] * 4,
        c_int64,
    ]
    loaded.moesaic_attention_half_step.argtypes = [c_void_p, c_void_p, c_int64, *[c_void_p] * 3, c_int64]
    loaded.moesaic_moe_half_step.argtypes = [
        *[c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64],
        *[c_void_p] * 5,
        c_int64,
    ]
    for name in ("attention_step", "router_step", "attention_half_step", "moe_half_step"):
        getattr(loaded, f"moesaic_{name}").restype = ctypes.c_long
    return Calls(
        loaded.moesaic_linears_run,
        loaded.moesaic_norm_rows,
        loaded.moesaic_attention_step,
        loaded.moesaic_router_step,
        loaded.moesaic_attention_half_step,
        loaded.moesaic_moe_half_step,
    )
