"""What a step of decoding runs natively besides experts: few-row projections, norms, routing, and attention.

A plan holds the addresses of a module's weights for the C code of csrc/decode.h. It is built on first use and again
when a weight has moved, and never copied or pickled: whoever holds one copies its holder without it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.layer.kernels.native import decode_library, library
from moesaic.layer.kernels.native.experts import packed
from moesaic.layer.kernels.weights import ExpertWeights

_NO_SUCH_PICK = -3

# Most rows (tokens of all sequences) that these functions are for.
ROWS_MOST = 16


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
    """Whether a computation with this input and weight may run here now: plain CPU tensors, one dtype, no gradients.

    Contiguity of the weight and the number of rows are for the caller to check.
    """
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and x.is_cpu
        and weight.is_cpu
        and x.dtype is weight.dtype
        and x.dtype in library.DTYPES
        and not torch.is_autocast_enabled("cpu")
        # Modes that count, fake or record operations would see none.
        and torch._C._len_torch_dispatch_stack() == 0
    )


# Weight (O, I) and bias (O,); weight (D,) and epsilon.
Pair = tuple[Tensor, Tensor | None]
Norm = tuple[Tensor, float]


def _linears(pairs: Sequence[Pair]) -> decode_library.Linears:
    """Projections (weight (O, I), bias (O,) or None) of one input."""
    call, first = decode_library.Linears(), pairs[0][0]
    call.type, call.count, call.inputs = library.DTYPES[first.dtype], len(pairs), first.shape[1]
    for index, (weight_OI, bias_O) in enumerate(pairs):
        if weight_OI.stride(1) != 1 or weight_OI.dtype is not first.dtype:
            raise ValueError(f"needs weights of one dtype with contiguous rows, got {weight_OI.stride()}")
        call.weight[index], call.stride[index] = weight_OI.data_ptr(), weight_OI.stride(0)
        call.out[index], call.bias[index] = weight_OI.shape[0], None if bias_O is None else bias_O.data_ptr()
    return call


def _norm(weight_D: Tensor, epsilon: float) -> decode_library.Norm:
    return decode_library.Norm(library.DTYPES[weight_D.dtype], weight_D.shape[0], weight_D.data_ptr(), epsilon)


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
        self._run = decode_library.calls().linears

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
        self._run = decode_library.calls().norm

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


def _router(weight_ND: Tensor, bias_N: Tensor | None, rule: RouterRule) -> decode_library.Router:
    return decode_library.Router(
        _linears([(weight_ND, bias_N)]),
        rule.top_k,
        rule.sigmoid,
        rule.over_selected,
        rule.normalize,
        rule.round_logits,
        rule.round_weights,
        rule.epsilon,
        rule.scale,
    )


class RouterPlan:
    """Logits, scores and the K best experts of a few tokens.

    Args:
        weight_ND: of the logits.
        bias_N: likewise, or None.
        rule: what follows.
    """

    def __init__(self, weight_ND: Tensor, bias_N: Tensor | None, rule: RouterRule) -> None:
        self._call = _router(weight_ND, bias_N, rule)
        self._address = ctypes.addressof(self._call)
        self.address, self.rule = weight_ND.data_ptr(), rule
        self._num_experts, self._top_k = weight_ND.shape[0], rule.top_k
        self._run = decode_library.calls().router

    def __call__(self, x_TD: Tensor) -> Picks:
        """The picks of (T, D)."""
        rows = x_TD.shape[0]
        picks = _no_picks(rows, self._num_experts, self._top_k)
        failed = self._run(
            self._address,
            x_TD.data_ptr(),
            x_TD.stride(0),
            rows,
            None,
            self._top_k,
            *map(Tensor.data_ptr, picks),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for {rows} rows of {self._num_experts} experts")
        return picks


class Picks(NamedTuple):
    """What a router decided, in float32 but for the int64 index, best first."""

    logits_TN: Tensor
    scores_TN: Tensor
    index_TK: Tensor
    weight_TK: Tensor


def _no_picks(rows: int, num_experts: int, top_k: int) -> Picks:
    return Picks(
        torch.empty(rows, num_experts),
        torch.empty(rows, num_experts),
        torch.empty(rows, top_k, dtype=torch.int64),
        torch.empty(rows, top_k),
    )


class Place:
    """Where the new token of each sequence goes: a cache with room for it.

    Args:
        keys, values: (B, kv_heads, room, width), contiguous.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self._call = decode_library.Place(keys=keys.data_ptr(), values=values.data_ptr())
        self._call.batch_stride, self._call.head_stride = keys.stride(0), keys.stride(1)

    def __deepcopy__(self, memo: dict) -> Place:
        return Place(self.keys.clone(), self.values.clone())

    def __reduce__(self) -> Any:
        return Place, (self.keys, self.values)

    def at(self, length: int, cos: Tensor, sin: Tensor, mask_BL: Tensor | None) -> int:
        """Address for a call.

        Args:
            length: tokens in the cache, the new one included.
            cos, sin: rotation of this position, contiguous (B or 1, 1, width).
            mask_BL: bool (B or 1, ..., length) with contiguous rows, False for what is not looked at.
        """
        call = self._call
        call.length, call.cos, call.sin = length, cos.data_ptr(), sin.data_ptr()
        call.rotation_stride = 0 if cos.shape[0] == 1 else cos.stride(0)
        call.mask = None if mask_BL is None else mask_BL.data_ptr()
        call.mask_stride = 0 if mask_BL is None or mask_BL.shape[0] == 1 else mask_BL.stride(0)
        return ctypes.addressof(call)


class AttentionWeights(NamedTuple):
    """Weight and bias of the projections, width of a head, factor of the products, and norms on heads or None."""

    q: Pair
    k: Pair
    v: Pair
    o: Pair
    width: int
    scaling: float
    q_norm: Norm | None = None
    k_norm: Norm | None = None


def _attention(weights: AttentionWeights) -> decode_library.Attention:
    return decode_library.Attention(
        _linears([weights.q, weights.k, weights.v]),
        _linears([weights.o]),
        decode_library.Norm() if weights.q_norm is None else _norm(*weights.q_norm),
        decode_library.Norm() if weights.k_norm is None else _norm(*weights.k_norm),
        weights.q[0].shape[0] // weights.width,
        weights.k[0].shape[0] // weights.width,
        weights.width,
        weights.scaling,
    )


class AttentionPlan:
    """Attention of one new token of each sequence: projections, head norms, rotation, cache, output projection."""

    def __init__(self, weights: AttentionWeights) -> None:
        self._call = _attention(weights)
        self._address = ctypes.addressof(self._call)
        self._hidden = weights.o[0].shape[0]
        self._run = decode_library.calls().attention

    def __call__(self, x_BD: Tensor, place: int) -> Tensor:
        """Attend from the normalised input, writing the new key and value at `place`; returns (B, D)."""
        y_BD = x_BD.new_empty(x_BD.shape[0], self._hidden)
        failed = self._run(
            self._address,
            x_BD.data_ptr(),
            x_BD.stride(0),
            x_BD.shape[0],
            place,
            y_BD.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for attention of {x_BD.shape[0]} sequences")
        return y_BD


class AttentionHalfPlan:
    """The first half of a decoder layer with norms before its halves: x + attention(norm(x)), and the next norm."""

    def __init__(self, before: Norm, weights: AttentionWeights, after: Norm) -> None:
        self._call = decode_library.AttentionHalf(_norm(*before), _norm(*after), _attention(weights))
        self._address = ctypes.addressof(self._call)
        self._run = decode_library.calls().attention_half

    def __call__(self, x_B1D: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """The sum and its norm, of the shape of a contiguous (B, 1, D)."""
        sum_B1D, y_B1D = torch.empty_like(x_B1D), torch.empty_like(x_B1D)
        failed = self._run(
            self._address,
            x_B1D.data_ptr(),
            x_B1D.shape[0],
            place,
            sum_B1D.data_ptr(),
            y_B1D.data_ptr(),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for attention of {x_B1D.shape[0]} sequences")
        return sum_B1D, y_B1D


class MoEHalfPlan:
    """Router and packed experts in one call.

    Args:
        weight_ND, bias_N, rule: as for `RouterPlan`.
        experts: weights with contiguous rows and a known activation.
    """

    def __init__(self, weight_ND: Tensor, bias_N: Tensor | None, rule: RouterRule, experts: ExpertWeights) -> None:
        self._num_experts, self._top_k = weight_ND.shape[0], rule.top_k
        self._call = decode_library.MoEHalf(_router(weight_ND, bias_N, rule), packed(experts), self._num_experts)
        self._address = ctypes.addressof(self._call)
        self._run = decode_library.calls().moe_half

    def __call__(self, x_TD: Tensor, residual: Tensor | None, ask_TK: Tensor | None = None) -> tuple[Tensor, Picks]:
        """The experts' output and the picks.

        Args:
            x_TD: input, contiguous.
            residual: added to the output, which has the shape of `x_TD`; or None.
            ask_TK: int64, contiguous: other picks than the K best, as `layer.override.Asked` says them.
        """
        rows = x_TD.numel() // x_TD.shape[-1]
        wide = self._top_k if ask_TK is None else ask_TK.shape[1]
        if ask_TK is not None and (ask_TK.shape[0] != rows or not ask_TK.is_contiguous()):
            raise ValueError(f"picks of {ask_TK.shape[0]} tokens do not fit {rows} rows")
        picks = _no_picks(rows, self._num_experts, wide)
        y_TD = torch.empty_like(x_TD)
        failed = self._run(
            self._address,
            x_TD.data_ptr(),
            rows,
            None if residual is None else residual.data_ptr(),
            None if ask_TK is None else ask_TK.data_ptr(),
            wide,
            *map(Tensor.data_ptr, picks),
            y_TD.data_ptr(),
            torch.get_num_threads(),
        )
        if failed == _NO_SUCH_PICK:
            raise ValueError(f"picks outside of the {self._num_experts} experts and ranks: {ask_TK}")
        if failed:
            raise MemoryError(f"no memory for {rows} rows of {self._num_experts} experts")
        return y_TD, picks
