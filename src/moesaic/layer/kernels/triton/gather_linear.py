"""First projection: rows of tokens times each expert's weights, with gather, bias and activation inside."""

# Triton's types describe neither launches nor values inside kernels.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moesaic.layer.kernels.triton import tiles
from moesaic.layer.kernels.triton.activation import activate, factor
from moesaic.layer.kernels.triton.formula import Formula
from moesaic.layer.kernels.triton.precision import dot_precision
from moesaic.layer.kernels.triton.schedule import Schedule
from moesaic.layer.kernels.triton.tile_product import halves, locate, product, two_products


def gather_linear(
    x_TD: Tensor,
    up_NHD: Tensor,
    up_bias_NH: Tensor | None,
    pick_S: Tensor,
    end_N: Tensor,
    top_k: int,
    schedule: Schedule,
    formula: Formula,
    *,
    save_up: bool,
) -> tuple[Tensor, Tensor | None]:
    """hidden_SF = act(x[token] @ up[e].T + bias[e]) for the rows of each expert.

    Rows of no expert are not computed: they hold whatever the memory held, or zero for the identity.

    Args:
        x_TD: tokens, contiguous.
        up_NHD: weights, with any strides.
        up_bias_NH: their bias, or None.
        pick_S: pick of each row.
        end_N: one past the last row of each expert.
        top_k: K.
        schedule: row blocks.
        formula: what stands between the projections.
        save_up: also return what went into the activation.

    Returns:
        hidden_SF, and up_SH or None.
    """
    num_rows, (num_experts, up_width, size_in) = pick_S.numel(), up_NHD.shape
    width = up_width // 2 if formula.gated else up_width
    allocate = x_TD.new_zeros if formula.activation == "identity" else x_TD.new_empty
    hidden_SF = allocate(num_rows, width)
    up_SH = x_TD.new_empty(num_rows, up_width) if save_up else None
    outs = width if formula.two_halves else up_width
    tile = tiles.choose(
        "two_up" if formula.two_halves else "up", num_rows / num_experts, outs, size_in, x_TD.dtype, x_TD.device
    )
    _gather_linear[(schedule.num_blocks * triton.cdiv(outs, tile.outs),)](
        x_TD,
        up_NHD,
        up_bias_NH,
        hidden_SF,
        up_SH,
        pick_S,
        end_N,
        schedule.expert_B,
        schedule.start_B,
        schedule.num_blocks,
        top_k,
        size_in,
        width,
        outs,
        up_NHD.stride(0),
        up_NHD.stride(1),
        up_NHD.stride(2),
        formula.alpha,
        formula.limit,
        ACTIVATION=formula.activation,
        GATED=formula.gated,
        INTERLEAVED=formula.interleaved,
        HAS_BIAS=up_bias_NH is not None,
        SAVE_UP=save_up,
        BLOCK_ROWS=schedule.block_rows,
        BLOCK_OUT=tile.outs,
        BLOCK_IN=tile.inner,
        EVEN_IN=size_in % tile.inner == 0,
        EVEN_OUT=outs % tile.outs == 0,
        GROUP_ROWS=tiles.GROUP_ROWS,
        PRECISION=dot_precision(x_TD.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return hidden_SF, up_SH


@triton.jit(do_not_specialize=["num_blocks"])
def _gather_linear(
    x_ptr,
    weight_ptr,
    bias_ptr,
    hidden_ptr,
    up_ptr,
    pick_ptr,
    end_ptr,
    block_expert_ptr,
    block_start_ptr,
    num_blocks,
    top_k,
    size_in,
    width,
    outs,  # columns that the grid covers: 2F if gate and up alternate, else F
    stride_expert,
    stride_out,
    stride_in,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_UP: tl.constexpr,
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
    token = tl.load(pick_ptr + row, mask=row_mask, other=0) // top_k
    row = row.to(tl.int64)
    out = out_block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_mask = out < outs
    inner = tl.arange(0, BLOCK_IN)
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * size_in + inner[None, :]
    weight_ptrs = weight_ptr + expert * stride_expert + out[None, :] * stride_out + inner[:, None] * stride_in
    dtype = hidden_ptr.dtype.element_ty
    if GATED and not INTERLEAVED:
        mask = row_mask[:, None] & out_mask[None, :]
        up_ptrs = weight_ptrs + width * stride_out
        gate, up = two_products(
            x_ptrs, weight_ptrs, up_ptrs, row_mask, out_mask, size_in, 1, stride_in,
            BLOCK_ROWS, BLOCK_OUT, BLOCK_IN, EVEN_IN, EVEN_OUT, PRECISION,
        )  # fmt: skip
        if HAS_BIAS:
            bias_ptrs = bias_ptr + expert * 2 * width + out
            gate += tl.load(bias_ptrs, mask=out_mask, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_ptrs + width, mask=out_mask, other=0.0).to(tl.float32)[None, :]
        if SAVE_UP:
            saved_ptrs = up_ptr + row[:, None] * (2 * width) + out[None, :]
            tl.store(saved_ptrs, gate.to(dtype), mask=mask)
            tl.store(saved_ptrs + width, up.to(dtype), mask=mask)
        hidden = activate(gate, ACTIVATION, alpha, limit) * factor(up, ACTIVATION, limit)
        tl.store(hidden_ptr + row[:, None] * width + out[None, :], hidden.to(dtype), mask=mask)
    else:
        both = product(
            x_ptrs, weight_ptrs, row_mask, out_mask, size_in, 1, stride_in,
            BLOCK_ROWS, BLOCK_OUT, BLOCK_IN, EVEN_IN, EVEN_OUT, PRECISION,
        )  # fmt: skip
        first = out_block * BLOCK_OUT
        own_bias_ptr = bias_ptr
        if HAS_BIAS:
            own_bias_ptr += expert * outs
        if BLOCK_OUT >= 256:
            # Half of the columns at a time, so that what the activation needs stays in registers.
            left, right = halves(both, BLOCK_ROWS, BLOCK_OUT)
            _write(
                left, own_bias_ptr, up_ptr, hidden_ptr, row, row_mask, first, outs, width, alpha, limit,
                ACTIVATION, INTERLEAVED, HAS_BIAS, SAVE_UP, BLOCK_ROWS, BLOCK_OUT // 2,
            )  # fmt: skip
            _write(
                right, own_bias_ptr, up_ptr, hidden_ptr, row, row_mask, first + BLOCK_OUT // 2, outs, width,
                alpha, limit, ACTIVATION, INTERLEAVED, HAS_BIAS, SAVE_UP, BLOCK_ROWS, BLOCK_OUT // 2,
            )  # fmt: skip
        else:
            _write(
                both, own_bias_ptr, up_ptr, hidden_ptr, row, row_mask, first, outs, width, alpha, limit,
                ACTIVATION, INTERLEAVED, HAS_BIAS, SAVE_UP, BLOCK_ROWS, BLOCK_OUT,
            )  # fmt: skip


@triton.jit
def _write(
    both,  # (BLOCK_ROWS, COLUMNS) of one product: plain, or gate and up alternating
    bias_ptr,
    up_ptr,
    hidden_ptr,
    row,
    row_mask,
    first,  # first column
    outs,
    width,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_UP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype = hidden_ptr.dtype.element_ty
    out = first + tl.arange(0, COLUMNS)
    mask = row_mask[:, None] & (out < outs)[None, :]
    if HAS_BIAS:
        both += tl.load(bias_ptr + out, mask=out < outs, other=0.0).to(tl.float32)[None, :]
    if SAVE_UP:
        tl.store(up_ptr + row[:, None] * outs + out[None, :], both.to(dtype), mask=mask)
    if INTERLEAVED:
        gate, up = tl.split(tl.reshape(both, (BLOCK_ROWS, COLUMNS // 2, 2)))
        hidden = activate(gate, ACTIVATION, alpha, limit) * factor(up, ACTIVATION, limit)
        half = first // 2 + tl.arange(0, COLUMNS // 2)
        half_mask = row_mask[:, None] & (half < width)[None, :]
        tl.store(hidden_ptr + row[:, None] * width + half[None, :], hidden.to(dtype), mask=half_mask)
    else:
        hidden = activate(both, ACTIVATION, alpha, limit)
        tl.store(hidden_ptr + row[:, None] * width + out[None, :], hidden.to(dtype), mask=mask)
