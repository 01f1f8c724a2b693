"""What a step of decoding runs natively besides experts: few-row projections, norms, routing, and attention.

A plan holds the addresses of a module's weights for the C code of csrc/decode.h. It is built on first use and again
when a weight has moved, and never copied or pickled: whoever holds one copies its holder without it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.layer.kernels.native import library

LINEARS_MOST = 4

# Most rows (tokens of all sequences) that these functions are for.
ROWS_MOST = 16


class _Linears(ctypes.Structure):
    _fields_ = (
        ("type", c_int64),
        ("count", c_int64),
        ("inputs", c_int64),
        ("weight", c_void_p * LINEARS_MOST),
        ("stride", c_int64 * LINEARS_MOST),
        ("out", c_int64 * LINEARS_MOST),
        ("bias", c_void_p * LINEARS_MOST),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("type", c_int64), ("width", c_int64), ("weight", c_void_p), ("epsilon", c_double))


class _Attention(ctypes.Structure):
    _fields_ = (
        ("projections", _Linears),
        ("output", _Linears),
        ("q_norm", _Norm),
        ("k_norm", _Norm),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("width", c_int64),
        ("scaling", c_double),
    )


class _Router(ctypes.Structure):
    _fields_ = (
        ("logits", _Linears),
        ("top_k", c_int64),
        ("sigmoid", c_int64),
        ("over_selected", c_int64),
        ("normalize", c_int64),
        ("round_logits", c_int64),
        ("round_scores", c_int64),
        ("epsilon", c_double),
        ("scale", c_double),
        ("selection_bias", c_void_p),
    )


@dataclass(frozen=True)
class _Calls:
    linears: Callable[..., int]
    norm: Callable[..., None]
    attention: Callable[..., int]
    router: Callable[..., int]


@functools.cache
def _calls() -> _Calls:
    loaded = library.load()
    assert loaded is not None
    loaded.moesaic_linears_run.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64]
    loaded.moesaic_linears_run.restype = ctypes.c_long
    loaded.moesaic_norm_rows.argtypes = [c_void_p, c_void_p, c_int64, c_int64, c_void_p]
    loaded.moesaic_norm_rows.restype = None
    loaded.moesaic_attention_step.argtypes = [
        *[c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64],
        *[c_int64, c_void_p, c_int64, c_void_p, c_int64],
    ]
    loaded.moesaic_attention_step.restype = ctypes.c_long
    loaded.moesaic_router_step.argtypes = [*[c_void_p, c_void_p, c_int64, c_int64], *[c_void_p] * 4, c_int64]
    loaded.moesaic_router_step.restype = ctypes.c_long
    return _Calls(
        loaded.moesaic_linears_run, loaded.moesaic_norm_rows, loaded.moesaic_attention_step, loaded.moesaic_router_step
    )


def available() -> bool:
    """Whether the native library was built."""
    return library.load() is not None


def readable(weight: object) -> bool:
    """Whether a weight is a plain matrix or vector on CPU with contiguous rows: not quantised, sharded or packed."""
    return (
        type(weight) is torch.nn.Parameter
        and weight.is_cpu
        and weight.dtype in library.DTYPES
        and weight.dim() in (1, 2)
        and weight.stride(-1) == 1
    )


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether a computation with this input and weight may run here now: plain CPU tensors, one dtype, no graph.

    Contiguity of the weight and the number of rows are for the caller to check.
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and weight.is_cpu
        and x.dtype is weight.dtype
        and x.dtype in library.DTYPES
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


Pair = tuple[Tensor, Tensor | None]


def _linears(pairs: Sequence[Pair]) -> _Linears:
    """Projections (weight (O, I), bias (O,) or None) of one input."""
    call, first = _Linears(), pairs[0][0]
    call.type, call.count, call.inputs = library.DTYPES[first.dtype], len(pairs), first.shape[1]
    for index, (weight_OI, bias_O) in enumerate(pairs):
        if weight_OI.stride(1) != 1 or weight_OI.dtype is not first.dtype:
            raise ValueError(f"needs weights of one dtype with contiguous rows, got {weight_OI.stride()}")
        call.weight[index], call.stride[index] = weight_OI.data_ptr(), weight_OI.stride(0)
        call.out[index], call.bias[index] = weight_OI.shape[0], None if bias_O is None else bias_O.data_ptr()
    return call


def _norm(weight_D: Tensor, epsilon: float) -> _Norm:
    return _Norm(library.DTYPES[weight_D.dtype], weight_D.shape[0], weight_D.data_ptr(), epsilon)


class LinearsPlan:
    """Up to four projections of the same rows in one pass over the threads.

    Args:
        pairs: weight (O, I) and bias (O,) or None of each.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._call = _linears(pairs)
        self._address = ctypes.addressof(self._call)
        self.address = pairs[0][0].data_ptr()
        self.outs = [weight_OI.shape[0] for weight_OI, _ in pairs]
        self._run = _calls().linears

    def __call__(self, x_TI: Tensor) -> Tensor:
        """The outputs (T, O) one after the other, flat."""
        rows = x_TI.shape[0]
        out = x_TI.new_empty(rows * sum(self.outs))
        failed = self._run(
            self._address, x_TI.data_ptr(), x_TI.stride(0), rows, out.data_ptr(), 0, torch.get_num_threads()
        )
        if failed:
            raise MemoryError(f"no memory for {rows} rows")
        return out


class NormPlan:
    """w * (x / rms(x)), rounded to the dtype before the weight and after it, as stock families do.

    Args:
        weight_D: w.
        epsilon: added to the mean square.
    """

    def __init__(self, weight_D: Tensor, epsilon: float) -> None:
        self._call = _norm(weight_D, epsilon)
        self._address = ctypes.addressof(self._call)
        self.address = weight_D.data_ptr()
        self._run = _calls().norm

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Normalised rows of a contiguous (..., D)."""
        y_TD, width = torch.empty_like(x_TD), x_TD.shape[-1]
        self._run(self._address, x_TD.data_ptr(), width, x_TD.numel() // width, y_TD.data_ptr())
        return y_TD


@dataclass(frozen=True)
class RouterRule:
    """How logits become picks: the fields of `TopKConfig` that native code knows.

    Attributes:
        top_k: K.
        sigmoid: scores are sigmoids of the logits instead of their softmax.
        over_selected: weights are the softmax over the selected logits.
        normalize: divide the weights by their sum plus `epsilon`.
        scale: multiplies the weights.
        round_logits: round logits to the input's dtype before anything else, as stock routers do.
        round_weights: round the weights to it.
    """

    top_k: int
    sigmoid: bool = False
    over_selected: bool = False
    normalize: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
    round_logits: bool = False
    round_weights: bool = False


class RouterPlan:
    """Logits, scores and the K best experts of a few tokens.

    Args:
        weight_ND: of the logits.
        bias_N: likewise, or None.
        rule: what follows.
        selection_bias_N: float32, added in the comparison only; or None.
    """

    def __init__(
        self, weight_ND: Tensor, bias_N: Tensor | None, rule: RouterRule, selection_bias_N: Tensor | None = None
    ) -> None:
        self._call = _Router(
            _linears([(weight_ND, bias_N)]),
            rule.top_k,
            rule.sigmoid,
            rule.over_selected,
            rule.normalize,
            rule.round_logits,
            rule.round_weights,
            rule.epsilon,
            rule.scale,
            None if selection_bias_N is None else selection_bias_N.data_ptr(),
        )
        self._address = ctypes.addressof(self._call)
        self.address = weight_ND.data_ptr()
        self._num_experts, self._top_k = weight_ND.shape[0], rule.top_k
        self._run = _calls().router

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """logits_TN, scores_TN, index_TK (int64, best first) and weight_TK; all but the index float32."""
        rows = x_TD.shape[0]
        logits_TN = torch.empty(rows, self._num_experts)
        scores_TN = torch.empty(rows, self._num_experts)
        index_TK = torch.empty(rows, self._top_k, dtype=torch.int64)
        weight_TK = torch.empty(rows, self._top_k)
        failed = self._run(
            self._address,
            x_TD.data_ptr(),
            x_TD.stride(0),
            rows,
            logits_TN.data_ptr(),
            scores_TN.data_ptr(),
            index_TK.data_ptr(),
            weight_TK.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for {rows} rows of {self._num_experts} experts")
        return logits_TN, scores_TN, index_TK, weight_TK


class AttentionPlan:
    """Attention of one new token of each sequence: projections, head norms, rotation, cache, output projection.

    Args:
        q, k, v, o: weight and bias of the projections.
        width: of a head.
        scaling: multiplies the products of queries and keys.
        q_norm, k_norm: weight and epsilon of a norm on each head, or None.
    """

    def __init__(
        self,
        q: Pair,
        k: Pair,
        v: Pair,
        o: Pair,
        width: int,
        scaling: float,
        q_norm: tuple[Tensor, float] | None = None,
        k_norm: tuple[Tensor, float] | None = None,
    ) -> None:
        self._call = _Attention(
            _linears([q, k, v]),
            _linears([o]),
            _Norm() if q_norm is None else _norm(*q_norm),
            _Norm() if k_norm is None else _norm(*k_norm),
            q[0].shape[0] // width,
            k[0].shape[0] // width,
            width,
            scaling,
        )
        self._address = ctypes.addressof(self._call)
        self.kv_heads = k[0].shape[0] // width
        self._hidden = o[0].shape[0]
        self._run = _calls().attention

    def __call__(
        self, x_BD: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, length: int, mask_BL: Tensor | None
    ) -> Tensor:
        """Attend, writing the new key and value at `length` - 1.

        Args:
            x_BD: the normalised input.
            cos, sin: rotation of this position, contiguous (B or 1, width).
            keys, values: caches (B, kv_heads, room, width) with room for `length`.
            length: tokens in the cache, the new one included.
            mask_BL: bool (B or 1, length), False for what is not looked at.

        Returns:
            (B, D).
        """
        batch = x_BD.shape[0]
        y_BD = x_BD.new_empty(batch, self._hidden)
        failed = self._run(
            self._address,
            x_BD.data_ptr(),
            x_BD.stride(0),
            batch,
            cos.data_ptr(),
            sin.data_ptr(),
            0 if cos.shape[0] == 1 else cos.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            keys.stride(0),
            keys.stride(1),
            length,
            None if mask_BL is None else mask_BL.data_ptr(),
            0 if mask_BL is None or mask_BL.shape[0] == 1 else mask_BL.stride(0),
            y_BD.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for {batch} sequences of {length} tokens")
        return y_BD
