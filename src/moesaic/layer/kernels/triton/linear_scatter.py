"""Rows times each expert's weights, written to the picks they came from and summed over the picks of a token.

The second projection (weighted, with bias) and the gradient of the first one's input (neither) are the same product with
other strides.
"""

# Triton's types describe neither launches nor values inside kernels.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.layer.kernels.triton import tiles
from moesaic.layer.kernels.triton.pick_sum import sum_picks
from moesaic.layer.kernels.triton.precision import dot_precision
from moesaic.layer.kernels.triton.schedule import Schedule
from moesaic.layer.kernels.triton.tile_product import locate, product


def linear_scatter(
    rows_SI: Tensor,
    weight_NOI: Tensor,
    bias_NO: Tensor | None,
    combine_TK: Tensor | None,
    index_TK: Tensor,
    pick_S: Tensor,
    end_N: Tensor,
    schedule: Schedule,
    *,
    atomic: bool,
) -> Tensor:
    """y_t = sum over k of combine_tk * (rows[row of (t, k)] @ weight[e].T + bias[e]), summed in float32.

    Args:
        rows_SI: rows in expert order, contiguous; those of no expert are not read.
        weight_NOI: weights, with any strides.
        bias_NO: their bias, or None.
        combine_TK: combine weights, or None for ones.
        index_TK: picks; N stands for no expert.
        pick_S: pick of each row.
        end_N: one past the last row of each expert.
        schedule: row blocks.
        atomic: add the picks of a token with atomics, in no fixed order, instead of writing S rows and summing them.

    Returns:
        y_TO in the dtype of the rows.
    """
    (tokens, top_k), (num_experts, outs, size_in) = index_TK.shape, weight_NOI.shape
    num_rows = pick_S.numel()
    out = rows_SI.new_zeros(tokens, outs, dtype=torch.float32) if atomic else rows_SI.new_empty(num_rows, outs)
    tile = tiles.choose("down", num_rows / num_experts, outs, size_in, rows_SI.dtype, rows_SI.device)
    _linear_scatter[(schedule.num_blocks * triton.cdiv(outs, tile.outs),)](
        rows_SI,
        weight_NOI,
        bias_NO,
        combine_TK,
        out,
        pick_S,
        end_N,
        schedule.expert_B,
        schedule.start_B,
        schedule.num_blocks,
        top_k,
        size_in,
        outs,
        weight_NOI.stride(0),
        weight_NOI.stride(1),
        weight_NOI.stride(2),
        HAS_BIAS=bias_NO is not None,
        HAS_COMBINE=combine_TK is not None,
        ATOMIC=atomic,
        BLOCK_ROWS=schedule.block_rows,
        BLOCK_OUT=tile.outs,
        BLOCK_IN=tile.inner,
        EVEN_IN=size_in % tile.inner == 0,
        EVEN_OUT=outs % tile.outs == 0,
        GROUP_ROWS=tiles.GROUP_ROWS,
        PRECISION=dot_precision(rows_SI.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out.to(rows_SI.dtype) if atomic else sum_picks(out, index_TK, num_experts)


@triton.jit(do_not_specialize=["num_blocks"])
def _linear_scatter(
    rows_ptr,
    weight_ptr,
    bias_ptr,
    combine_ptr,
    out_ptr,
    pick_ptr,
    end_ptr,
    block_expert_ptr,
    block_start_ptr,
    num_blocks,
    top_k,
    size_in,
    outs,
    stride_expert,
    stride_out,
    stride_in,
    HAS_BIAS: tl.constexpr,
    HAS_COMBINE: tl.constexpr,
    ATOMIC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN_IN: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_block, out_block = locate(tl.program_id(0), num_blocks, tl.cdiv(outs, BLOCK_OUT), GROUP_ROWS)
    expert = tl.load(block_expert_ptr + row_block).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(block_start_ptr + row_block) + tl.arange(0, BLOCK_ROWS)
    row_mask = row < tl.load(end_ptr + expert)
    out = out_block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_mask = out < outs
    inner = tl.arange(0, BLOCK_IN)
    total = product(
        rows_ptr + row.to(tl.int64)[:, None] * size_in + inner[None, :],
        weight_ptr + expert * stride_expert + out[None, :] * stride_out + inner[:, None] * stride_in,
        row_mask, out_mask, size_in, 1, stride_in,
        BLOCK_ROWS, BLOCK_OUT, BLOCK_IN, EVEN_IN, EVEN_OUT, PRECISION,
    )  # fmt: skip
    pick = tl.load(pick_ptr + row, mask=row_mask, other=0).to(tl.int64)
    if HAS_BIAS:
        total += tl.load(bias_ptr + expert * outs + out, mask=out_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_COMBINE:
        total *= tl.load(combine_ptr + pick, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    mask = row_mask[:, None] & out_mask[None, :]
    if ATOMIC:
        tl.atomic_add(out_ptr + (pick // top_k)[:, None] * outs + out[None, :], total, mask=mask, sem="relaxed")
    else:
        tl.store(out_ptr + pick[:, None] * outs + out[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)
