"""Gradients of packed weights and biases: sums over the rows of each expert, written once into the packed tensor."""

# Triton's types describe neither launches nor values inside kernels.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.layer.kernels.triton import tiles
from moesaic.layer.kernels.triton.precision import dot_precision
from moesaic.layer.kernels.triton.tile_product import locate


def weight_gradient(
    left: Tensor,
    right: Tensor,
    pick_S: Tensor,
    end_N: Tensor,
    top_k: int,
    like_NOI: Tensor,
    *,
    gather_left: bool,
) -> Tensor:
    """grad[e] = sum over the rows of expert e of left_row (outer) right_row; zero for experts without rows.

    One of the factors stands in token order and is gathered on the fly.

    Args:
        left: (T, O) if `gather_left`, else (S, O); contiguous.
        right: (S, I) if `gather_left`, else (T, I); contiguous.
        pick_S: pick of each row.
        end_N: one past the last row of each expert.
        top_k: K.
        like_NOI: the weights: shape, dtype and memory layout of the gradient.
        gather_left: which factor stands in token order.
    """
    num_rows, (num_experts, outs, ins) = pick_S.numel(), like_NOI.shape
    grad_NOI = torch.empty_like(like_NOI)
    tile = tiles.choose("weight_gradient", num_rows / num_experts, ins, outs, left.dtype, left.device)
    _weight_gradient[(triton.cdiv(outs, tile.rows) * triton.cdiv(ins, tile.outs), num_experts)](
        left,
        right,
        grad_NOI,
        pick_S,
        end_N,
        top_k,
        outs,
        ins,
        grad_NOI.stride(0),
        grad_NOI.stride(1),
        grad_NOI.stride(2),
        GATHER_LEFT=gather_left,
        BLOCK_OUT=tile.rows,
        BLOCK_IN=tile.outs,
        BLOCK_ROWS=tile.inner,
        GROUP_OUT=tiles.GROUP_ROWS,
        PRECISION=dot_precision(left.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return grad_NOI


@triton.jit
def _weight_gradient(
    left_ptr,
    right_ptr,
    grad_ptr,
    pick_ptr,
    end_ptr,
    top_k,
    outs,
    ins,
    stride_expert,
    stride_out,
    stride_in,
    GATHER_LEFT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.program_id(1)
    out_block, in_block = locate(tl.program_id(0), tl.cdiv(outs, BLOCK_OUT), tl.cdiv(ins, BLOCK_IN), GROUP_OUT)
    first = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(end_ptr + expert)
    out = out_block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column = in_block * BLOCK_IN + tl.arange(0, BLOCK_IN)
    out_mask, column_mask = out < outs, column < ins
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    for start in range(first, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        row_mask = row < end
        token = tl.load(pick_ptr + row, mask=row_mask, other=0).to(tl.int64) // top_k
        left_row = token if GATHER_LEFT else row.to(tl.int64)
        right_row = row.to(tl.int64) if GATHER_LEFT else token
        left_ptrs = left_ptr + left_row[None, :] * outs + out[:, None]
        left = tl.load(left_ptrs, mask=out_mask[:, None] & row_mask[None, :], other=0.0)
        right_ptrs = right_ptr + right_row[:, None] * ins + column[None, :]
        right = tl.load(right_ptrs, mask=row_mask[:, None] & column_mask[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    offset = expert.to(tl.int64) * stride_expert + out[:, None] * stride_out + column[None, :] * stride_in
    mask = out_mask[:, None] & column_mask[None, :]
    tl.store(grad_ptr + offset, total.to(grad_ptr.dtype.element_ty), mask=mask)


def bias_gradient(
    rows: Tensor, combine_TK: Tensor | None, pick_S: Tensor, end_N: Tensor, top_k: int, dtype: torch.dtype
) -> Tensor:
    """grad[e] = sum over the rows of expert e; zero for experts without rows.

    Args:
        rows: (S, O) in expert order; with combine weights (T, O) in token order, which are weighted and gathered.
        combine_TK: combine weights, contiguous, or None.
        pick_S: pick of each row.
        end_N: one past the last row of each expert.
        top_k: K.
        dtype: of the result.

    Returns:
        (N, O).
    """
    outs, num_experts = rows.shape[1], end_N.numel()
    grad_NO = torch.empty(num_experts, outs, dtype=dtype, device=rows.device)
    block = min(128, triton.next_power_of_2(outs))
    _bias_gradient[(triton.cdiv(outs, block), num_experts)](
        rows,
        combine_TK,
        grad_NO,
        pick_S,
        end_N,
        top_k,
        outs,
        WEIGHTED=combine_TK is not None,
        BLOCK_ROWS=32,
        BLOCK_OUT=block,
    )
    return grad_NO


@triton.jit
def _bias_gradient(
    rows_ptr,
    combine_ptr,
    grad_ptr,
    pick_ptr,
    end_ptr,
    top_k,
    outs,
    WEIGHTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    expert = tl.program_id(1)
    first = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(end_ptr + expert)
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_mask = out < outs
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for start in range(first, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        row_mask = row < end
        mask = row_mask[:, None] & out_mask[None, :]
        if WEIGHTED:
            pick = tl.load(pick_ptr + row, mask=row_mask, other=0).to(tl.int64)
            combine = tl.load(combine_ptr + pick, mask=row_mask, other=0.0).to(tl.float32)
            values = tl.load(rows_ptr + (pick // top_k)[:, None] * outs + out[None, :], mask=mask, other=0.0)
            total += values.to(tl.float32) * combine[:, None]
        else:
            values = tl.load(rows_ptr + row.to(tl.int64)[:, None] * outs + out[None, :], mask=mask, other=0.0)
            total += values.to(tl.float32)
    offset = expert.to(tl.int64) * outs + out
    tl.store(grad_ptr + offset, tl.sum(total, axis=0).to(grad_ptr.dtype.element_ty), mask=out_mask)
