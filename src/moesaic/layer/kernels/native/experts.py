"""Packed experts on CPU in native code: no copy of weights or rows, one pass over the weights of the experts in use.

`native_experts` is a torch custom op around the C function; its backward is in backward.py.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from moesaic.layer.kernels.activation import FusedActivation
from moesaic.layer.kernels.native import backward, library
from moesaic.layer.kernels.native.call import Ordered, experts_call, fresh, order, rows_of, weight_rows_of
from moesaic.layer.kernels.selection import Case
from moesaic.layer.kernels.weights import ExpertWeights

# Codes of csrc/isa.h.
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "clamped_swiglu": 5}


def refuses(case: Case) -> str | None:
    """Why native code can't compute a case, or None."""
    dtype = case.autocast if case.autocast is not None and case.dtype != torch.float64 else case.dtype
    if case.device != "cpu":
        return f"is for CPU, got {case.device}"
    if dtype not in library.DTYPES:
        return f"takes float32, bfloat16 and float16, got {dtype}"
    if dtype != case.weight_dtype and case.autocast is None:
        return f"needs one dtype, got {case.dtype} input and {case.weight_dtype} weights"
    if case.fused is None:
        return "does not know the activation"
    return library.why_not()


def suits(case: Case) -> str | None:
    """Always: it is the fastest on CPU at every size that was measured."""
    return "reads each weight in use once, in place, with vector instructions"


def run(weights: ExpertWeights, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The same function as the `loop` kernel, within rounding."""
    fused = weights.fused
    assert fused is not None
    output_dtype = x_TD.dtype
    if torch.is_autocast_enabled("cpu"):
        x_TD = x_TD.to(torch.get_autocast_dtype("cpu"))
    up_NHD, down_NDF = weights.up_NHD.to(x_TD.dtype), weights.down_NDF.to(x_TD.dtype)
    up_bias_NH = None if weights.up_bias_NH is None else weights.up_bias_NH.to(x_TD.dtype)
    down_bias_ND = None if weights.down_bias_ND is None else weights.down_bias_ND.to(x_TD.dtype)
    tensors = (x_TD, up_NHD, down_NDF, up_bias_NH, down_bias_ND)
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, weight_TK))
    # Without a graph and a compiler the dispatcher would only cost time, which decoding notices. It unwraps subclasses,
    # as results of collectives are, which have no memory of their own to point at.
    plain = type(x_TD) is Tensor and not keeps and not torch.compiler.is_compiling()
    op = _forward if plain else torch.ops.moesaic.native_experts
    y_TD, _ = op(*tensors, index_TK, weight_TK.to(torch.float32), *arguments(fused), keeps)
    return y_TD.to(output_dtype)


def arguments(fused: FusedActivation) -> tuple[int, bool, bool, float, float]:
    """The activation as the op takes it: code, gated, interleaved, alpha, limit."""
    return _ACTIVATIONS[fused.name], fused.gated, fused.interleaved, fused.alpha or 0.0, fused.limit or 0.0


def packed(weights: ExpertWeights) -> library.ExpertsCall:
    """A call of the C function with its weights, that of one batch of rows still to be filled in."""
    fused, up_NHD, down_NDF = weights.fused, weights.up_NHD, weights.down_NDF
    assert fused is not None
    activation, gated, interleaved, alpha, limit = arguments(fused)
    call = library.ExpertsCall(type=library.DTYPES[up_NHD.dtype], activation=activation, gated=gated)
    call.interleaved, call.alpha, call.limit = interleaved, alpha, limit
    call.hidden, call.width = up_NHD.shape[2], down_NDF.shape[2]
    call.up, call.up_expert_stride, call.up_row_stride = up_NHD.data_ptr(), up_NHD.stride(0), up_NHD.stride(1)
    call.down, call.down_expert_stride, call.down_row_stride = (
        down_NDF.data_ptr(),
        down_NDF.stride(0),
        down_NDF.stride(1),
    )
    if weights.up_bias_NH is not None:
        call.up_bias, call.up_bias_stride = weights.up_bias_NH.data_ptr(), weights.up_bias_NH.stride(0)
    if weights.down_bias_ND is not None:
        call.down_bias, call.down_bias_stride = weights.down_bias_ND.data_ptr(), weights.down_bias_ND.stride(0)
    return call


def _forward(
    x_TD: Tensor,
    up_NHD: Tensor,
    down_NDF: Tensor,
    up_bias_NH: Tensor | None,
    down_bias_ND: Tensor | None,
    index_TK: Tensor,
    weight_TK: Tensor,
    activation: int,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    save_up: bool,
) -> tuple[Tensor, Tensor]:
    """(y_TD, rows of the first projection in expert order if `save_up`)."""
    x_TD, index_TK, weight_TK = rows_of(x_TD), index_TK.contiguous(), weight_TK.contiguous()
    up_NHD, down_NDF = weight_rows_of(up_NHD), weight_rows_of(down_NDF)
    saved_SH = fresh((index_TK.numel() if save_up else 0, up_NHD.shape[1]), x_TD.dtype)
    ordered = order(index_TK, up_NHD.shape[0])
    saved_SH[ordered.rows :] = 0
    if ordered.rows == 0:
        return torch.zeros_like(x_TD), saved_SH
    y_TD = torch.empty(x_TD.shape)
    call = experts_call(
        x_TD,
        up_NHD,
        down_NDF,
        up_bias_NH,
        down_bias_ND,
        ordered,
        weight_TK,
        activation,
        gated,
        interleaved,
        alpha,
        limit,
    )
    call.saved_up = saved_SH.data_ptr() if save_up else None
    call.y = y_TD.data_ptr()
    if _way(call, ordered)(ctypes.byref(call)) != 0:
        raise MemoryError(f"no memory for {ordered.rows} rows of {down_NDF.shape[2]} features")
    return y_TD.to(x_TD.dtype), saved_SH


# Mean rows of the experts in use at which the fastest way changes. Milliseconds at d 1024, f 512, 64 experts, top 8, two
# threads of an AVX-512 machine:
#   rows of each expert        2     4     8     32    64    256
#   float32   dots in place          11.3  14.6  24.6  44    180
#             packed                 20.0  21.8  32.7  48    140
#   bfloat16  dots in place    4.3   5.9   6.1   12.5  20.9  78
#             columns          5.0   6.2   5.9   9.0   17.7  65
#             packed           9.7   11.4  11.9  17.7  24.9  70
#   stored (in, out), float32 and bfloat16
#             streamed               8.6 5.4     11.0 8.4   39.7 35.0
#             packed                 23.3 9.6    25.0 10.4  33.5 15.1   49 25   132 71
_COLUMNS_FROM = 12
_DOTS_UP_TO = 96
_STREAMED_UP_TO = 12


def _way(call: library.ExpertsCall, ordered: Ordered) -> Any:
    """The C function that computes a forward pass fastest."""
    native = library.loaded()
    mean_rows = ordered.rows / ordered.expert_G.numel()
    if call.up_transposed and call.down_transposed and mean_rows <= _STREAMED_UP_TO:
        return native.moesaic_experts_forward_streamed
    if not call.up_transposed and not call.down_transposed:
        bfloat16 = call.type == library.DTYPES[torch.bfloat16] and native.moesaic_has_columns()
        if bfloat16 and mean_rows >= _COLUMNS_FROM and call.hidden % 16 == 0 and call.width % 16 == 0:
            return native.moesaic_experts_forward_columns
        if mean_rows <= _DOTS_UP_TO:
            return native.moesaic_experts_forward
    return native.moesaic_experts_forward_packed


native_experts = torch.library.custom_op("moesaic::native_experts", _forward, mutates_args=())


@native_experts.register_fake
def _(
    x_TD,
    up_NHD,
    down_NDF,
    up_bias,
    down_bias,
    index_TK,
    weight_TK,
    activation,
    gated,
    interleaved,
    alpha,
    limit,
    save_up,
):
    rows = index_TK.numel() if save_up else 0
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format), x_TD.new_empty(rows, up_NHD.shape[1])


native_experts.register_autograd(backward.backward, setup_context=backward.setup_context)
