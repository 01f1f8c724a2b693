"""Few rows: matrix-vector products straight from the picks, without sorting.

With a handful of picks almost every row meets another expert, so weights are read once whatever one does, and reading
them is all the time there is. One program reads a strip of one expert's matrix; two launches make a layer.
"""

# Triton's types describe neither launches nor values inside kernels.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moesaic.layer.kernels.triton.activation import activate, factor
from moesaic.layer.kernels.triton.formula import Formula

# Up to so many picks, T*K. Beyond, rows begin to share experts, and a product that reads each expert once is better.
MAX_PICKS = 64


def decode(
    x_TD: Tensor,
    up_NHD: Tensor,
    down_NDF: Tensor,
    up_bias_NH: Tensor | None,
    down_bias_ND: Tensor | None,
    index_TK: Tensor,
    combine_TK: Tensor,
    formula: Formula,
) -> Tensor:
    """The whole layer for few tokens, y_TD; the tensors are those of `ExpertWeights`, contiguous but for the weights."""
    (tokens, top_k), (num_experts, hidden_size, width) = index_TK.shape, down_NDF.shape
    hidden_PF = x_TD.new_empty(tokens * top_k, width)
    outs, inner = _strip(up_NHD)
    outs = min(outs, triton.next_power_of_2(width))
    _decode_up[(index_TK.numel(), triton.cdiv(width, outs))](
        x_TD,
        up_NHD,
        up_bias_NH,
        index_TK,
        hidden_PF,
        num_experts,
        top_k,
        hidden_size,
        width,
        up_NHD.stride(0),
        up_NHD.stride(1),
        up_NHD.stride(2),
        formula.alpha,
        formula.limit,
        ACTIVATION=formula.activation,
        GATED=formula.gated,
        INTERLEAVED=formula.interleaved,
        HAS_BIAS=up_bias_NH is not None,
        BLOCK_OUT=outs,
        BLOCK_IN=min(inner, triton.next_power_of_2(hidden_size)),
        num_warps=4,
    )
    y_TD = x_TD.new_empty(tokens, hidden_size)
    outs, inner = _strip(down_NDF)
    outs = min(outs, triton.next_power_of_2(hidden_size))
    _decode_down[(tokens, triton.cdiv(hidden_size, outs))](
        hidden_PF,
        down_NDF,
        down_bias_ND,
        index_TK,
        combine_TK,
        y_TD,
        num_experts,
        width,
        hidden_size,
        down_NDF.stride(0),
        down_NDF.stride(1),
        down_NDF.stride(2),
        TOP_K=top_k,
        HAS_BIAS=down_bias_ND is not None,
        BLOCK_OUT=outs,
        BLOCK_IN=min(inner, triton.next_power_of_2(width)),
        num_warps=4,
    )
    return y_TD


def _strip(weight_NOI: Tensor) -> tuple[int, int]:
    """(outs, inner) of a block: long where the weights are contiguous, and few outputs, so that there are many programs."""
    return (8, 256) if weight_NOI.stride(2) == 1 else (64, 32)


@triton.jit
def _decode_up(
    x_ptr,
    weight_ptr,
    bias_ptr,
    index_ptr,
    hidden_ptr,
    num_experts,
    top_k,
    size_in,
    width,
    stride_expert,
    stride_out,
    stride_in,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """act(x @ up[e].T + bias[e]) for one pick and BLOCK_OUT columns."""
    pick = tl.program_id(0).to(tl.int64)
    expert = tl.load(index_ptr + pick).to(tl.int64)
    if expert >= num_experts:
        return
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask = out < width
    gate_row = 2 * out if INTERLEAVED else out
    up_row = 2 * out + 1 if INTERLEAVED else width + out
    inner = tl.arange(0, BLOCK_IN)
    x_ptr += (pick // top_k) * size_in
    weight_ptr += expert * stride_expert
    gates = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    ups = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    for start in range(0, size_in, BLOCK_IN):
        column = start + inner
        x = tl.load(x_ptr + column, mask=column < size_in, other=0.0).to(tl.float32)
        block_mask = mask[:, None] & (column < size_in)[None, :]
        columns = (column * stride_in)[None, :]
        block = tl.load(weight_ptr + (gate_row * stride_out)[:, None] + columns, mask=block_mask, other=0.0)
        gates += block.to(tl.float32) * x[None, :]
        if GATED:
            block = tl.load(weight_ptr + (up_row * stride_out)[:, None] + columns, mask=block_mask, other=0.0)
            ups += block.to(tl.float32) * x[None, :]
    gate = tl.sum(gates, axis=1)
    if HAS_BIAS:
        bias_ptr += expert * (2 * width if GATED else width)
        gate += tl.load(bias_ptr + gate_row, mask=mask, other=0.0).to(tl.float32)
    hidden = activate(gate, ACTIVATION, alpha, limit)
    if GATED:
        up = tl.sum(ups, axis=1)
        if HAS_BIAS:
            up += tl.load(bias_ptr + up_row, mask=mask, other=0.0).to(tl.float32)
        hidden *= factor(up, ACTIVATION, limit)
    tl.store(hidden_ptr + pick * width + out, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _decode_down(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    index_ptr,
    combine_ptr,
    y_ptr,
    num_experts,
    size_in,
    outs,
    stride_expert,
    stride_out,
    stride_in,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """The weighted sum over the picks of one token, for BLOCK_OUT columns."""
    token = tl.program_id(0).to(tl.int64)
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask = out < outs
    inner = tl.arange(0, BLOCK_IN)
    total = tl.zeros((BLOCK_OUT,), dtype=tl.float32)
    for k in range(TOP_K):
        pick = token * TOP_K + k
        expert = tl.load(index_ptr + pick).to(tl.int64)
        if expert < num_experts:
            sums = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
            for start in range(0, size_in, BLOCK_IN):
                column = start + inner
                hidden = tl.load(hidden_ptr + pick * size_in + column, mask=column < size_in, other=0.0).to(tl.float32)
                block_ptrs = (
                    weight_ptr + expert * stride_expert + (out * stride_out)[:, None] + (column * stride_in)[None, :]
                )
                block = tl.load(block_ptrs, mask=mask[:, None] & (column < size_in)[None, :], other=0.0)
                sums += block.to(tl.float32) * hidden[None, :]
            row = tl.sum(sums, axis=1)
            if HAS_BIAS:
                row += tl.load(bias_ptr + expert * outs + out, mask=mask, other=0.0).to(tl.float32)
            total += row * tl.load(combine_ptr + pick).to(tl.float32)
    tl.store(y_ptr + token * outs + out, total.to(y_ptr.dtype.element_ty), mask=mask)
