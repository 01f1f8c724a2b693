"""Few rows: matrix-vector products straight from the picks, without sorting.

With a handful of picks almost every row meets another expert, so weights are read once whatever one does, and reading
them is all the time there is. One program reads a strip of one expert's matrix; two launches make a layer.
"""

# Triton's types describe neither launches nor values inside kernels.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moesaic.layer.kernels.triton.activation import activate, factor
from moesaic.layer.kernels.triton.formula import Formula

# Up to so many picks, T*K. Beyond, rows begin to share experts, and a product that reads each expert once is better.
MAX_PICKS = 64
STAGES = 4


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
    outs, inner = _strip(up_NHD, 8)
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
        STAGES=STAGES,
        num_warps=4,
    )
    y_TD = x_TD.new_empty(tokens, hidden_size)
    outs, inner = _strip(down_NDF, 4)
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
        STAGES=STAGES,
        num_warps=4,
    )
    return y_TD


def _strip(weight_NOI: Tensor, outs: int) -> tuple[int, int]:
    """(outs, inner) of a block: long where the weights are contiguous, so that loads are wide; few outputs make many programs.

    The second projection has a program for each token, the first one for each pick, so its strips are wider.
    """
    return (outs, 2048 // outs) if weight_NOI.stride(2) == 1 else (8 * outs, 256 // outs)


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
    STAGES: tl.constexpr,
):
    """act(x @ up[e].T + bias[e]) for one pick and BLOCK_OUT columns."""
    pick = tl.program_id(0).to(tl.int64)
    expert = tl.load(index_ptr + pick).to(tl.int64)
    if expert >= num_experts:
        return
    first = tl.program_id(1) * BLOCK_OUT
    inner = tl.arange(0, BLOCK_IN)
    x_ptr += (pick // top_k) * size_in
    weight_ptr += expert * stride_expert
    if HAS_BIAS:
        bias_ptr += expert * (2 * width if GATED else width)
    if INTERLEAVED:
        # Gate and up are neighbours: read both as they lie.
        pair = 2 * first + tl.arange(0, 2 * BLOCK_OUT)
        pair_mask = pair < 2 * width
        sums = tl.zeros((2 * BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
        for start in tl.range(0, size_in, BLOCK_IN, num_stages=STAGES):
            column = start + inner
            x = tl.load(x_ptr + column, mask=column < size_in, other=0.0).to(tl.float32)
            block_ptrs = weight_ptr + (pair * stride_out)[:, None] + (column * stride_in)[None, :]
            block = tl.load(block_ptrs, mask=pair_mask[:, None] & (column < size_in)[None, :], other=0.0)
            sums += block.to(tl.float32) * x[None, :]
        pairs = tl.sum(sums, axis=1)
        if HAS_BIAS:
            pairs += tl.load(bias_ptr + pair, mask=pair_mask, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(pairs, (BLOCK_OUT, 2)))
        hidden = activate(gate, ACTIVATION, alpha, limit) * factor(up, ACTIVATION, limit)
        out = first + tl.arange(0, BLOCK_OUT)
        tl.store(hidden_ptr + pick * width + out, hidden.to(hidden_ptr.dtype.element_ty), mask=out < width)
    else:
        out = first + tl.arange(0, BLOCK_OUT)
        mask = out < width
        gates = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
        ups = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
        for start in tl.range(0, size_in, BLOCK_IN, num_stages=STAGES):
            column = start + inner
            x = tl.load(x_ptr + column, mask=column < size_in, other=0.0).to(tl.float32)
            block_mask = mask[:, None] & (column < size_in)[None, :]
            block_ptrs = weight_ptr + (out * stride_out)[:, None] + (column * stride_in)[None, :]
            gates += tl.load(block_ptrs, mask=block_mask, other=0.0).to(tl.float32) * x[None, :]
            if GATED:
                up_block = tl.load(block_ptrs + width * stride_out, mask=block_mask, other=0.0)
                ups += up_block.to(tl.float32) * x[None, :]
        gate = tl.sum(gates, axis=1)
        if HAS_BIAS:
            gate += tl.load(bias_ptr + out, mask=mask, other=0.0).to(tl.float32)
        hidden = activate(gate, ACTIVATION, alpha, limit)
        if GATED:
            up = tl.sum(ups, axis=1)
            if HAS_BIAS:
                up += tl.load(bias_ptr + width + out, mask=mask, other=0.0).to(tl.float32)
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
    STAGES: tl.constexpr,
):
    """The weighted sum over the picks of one token, for BLOCK_OUT columns."""
    token = tl.program_id(0).to(tl.int64)
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask = out < outs
    inner = tl.arange(0, BLOCK_IN)
    blocks = tl.cdiv(size_in, BLOCK_IN)
    sums = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    # One loop over picks and blocks, so that the loads of the next pick do not wait for the sums of this one.
    for step in tl.range(0, TOP_K * blocks, num_stages=STAGES):
        pick = token * TOP_K + step // blocks
        expert = tl.load(index_ptr + pick).to(tl.int64)
        # A pick of no expert has no columns.
        size = tl.where(expert < num_experts, size_in, 0)
        column = (step % blocks) * BLOCK_IN + inner
        column_mask = column < size
        hidden = tl.load(hidden_ptr + pick * size_in + column, mask=column_mask, other=0.0).to(tl.float32)
        block_ptrs = weight_ptr + expert * stride_expert + (out * stride_out)[:, None] + (column * stride_in)[None, :]
        block = tl.load(block_ptrs, mask=mask[:, None] & column_mask[None, :], other=0.0)
        combine = tl.load(combine_ptr + pick, mask=expert < num_experts, other=0.0).to(tl.float32)
        sums += block.to(tl.float32) * (hidden * combine)[None, :]
    total = tl.sum(sums, axis=1)
    if HAS_BIAS:
        for k in range(TOP_K):
            pick = token * TOP_K + k
            expert = tl.load(index_ptr + pick).to(tl.int64)
            combine = tl.load(combine_ptr + pick, mask=expert < num_experts, other=0.0).to(tl.float32)
            bias_mask = out < tl.where(expert < num_experts, outs, 0)
            total += combine * tl.load(bias_ptr + expert * outs + out, mask=bias_mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * outs + out, total.to(y_ptr.dtype.element_ty), mask=mask)
