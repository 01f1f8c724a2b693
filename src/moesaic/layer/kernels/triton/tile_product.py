"""What the grouped GEMMs share: which tile a program computes, and the sum over the inner axis."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(pid, num_row_blocks, num_out_blocks, GROUP_ROWS: tl.constexpr):
    """(row block, out block) of a program.

    Programs that run at the same time cover GROUP_ROWS row blocks times some columns, so that both the rows and the
    weights that they read stay in the L2 cache.
    """
    group_size = GROUP_ROWS * num_out_blocks
    first = (pid // group_size) * GROUP_ROWS
    height = tl.minimum(num_row_blocks - first, GROUP_ROWS)
    within = pid % group_size
    return first + within % height, within // height


@triton.jit
def product(
    left_ptrs,  # (rows, BLOCK_IN) pointers to the first block
    right_ptrs,  # (BLOCK_IN, outs)
    row_mask,
    out_mask,
    size_in,
    left_step,  # distance between neighbours on the inner axis
    right_step,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN_IN: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """left @ right for one tile, accumulated in float32."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    inner = tl.arange(0, BLOCK_IN)
    for start in range(0, size_in, BLOCK_IN):
        left_mask = row_mask[:, None] if EVEN_IN else row_mask[:, None] & (inner[None, :] < size_in - start)
        left = tl.load(left_ptrs, mask=left_mask, other=0.0)
        if EVEN_IN and EVEN_OUT:
            right = tl.load(right_ptrs)
        else:
            right = tl.load(right_ptrs, mask=out_mask[None, :] & (inner[:, None] < size_in - start), other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        left_ptrs += BLOCK_IN * left_step
        right_ptrs += BLOCK_IN * right_step
    return total


@triton.jit
def two_products(
    left_ptrs,
    first_ptrs,
    second_ptrs,
    row_mask,
    out_mask,
    size_in,
    left_step,
    right_step,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN_IN: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """left @ first and left @ second, reading left once."""
    total_first = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    total_second = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    inner = tl.arange(0, BLOCK_IN)
    for start in range(0, size_in, BLOCK_IN):
        left_mask = row_mask[:, None] if EVEN_IN else row_mask[:, None] & (inner[None, :] < size_in - start)
        left = tl.load(left_ptrs, mask=left_mask, other=0.0)
        if EVEN_IN and EVEN_OUT:
            first = tl.load(first_ptrs)
            second = tl.load(second_ptrs)
        else:
            right_mask = out_mask[None, :] & (inner[:, None] < size_in - start)
            first = tl.load(first_ptrs, mask=right_mask, other=0.0)
            second = tl.load(second_ptrs, mask=right_mask, other=0.0)
        total_first = tl.dot(left, first, total_first, input_precision=PRECISION)
        total_second = tl.dot(left, second, total_second, input_precision=PRECISION)
        left_ptrs += BLOCK_IN * left_step
        first_ptrs += BLOCK_IN * right_step
        second_ptrs += BLOCK_IN * right_step
    return total_first, total_second


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
