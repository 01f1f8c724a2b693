"""Gradient through the second projection and the activation, in one product."""

# Triton's types describe neither launches nor values inside kernels.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.layer.kernels.triton import tiles
from moesaic.layer.kernels.triton.activation import activate, derivative, factor, factor_derivative
from moesaic.layer.kernels.triton.formula import Formula
from moesaic.layer.kernels.triton.precision import dot_precision
from moesaic.layer.kernels.triton.schedule import Schedule
from moesaic.layer.kernels.triton.tile_product import halves, locate, product


def hidden_gradient(
    grad_TD: Tensor,
    down_NDF: Tensor,
    up_SH: Tensor,
    combine_TK: Tensor,
    pick_S: Tensor,
    end_N: Tensor,
    schedule: Schedule,
    formula: Formula,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of up_SH, and what the gradients of the second projection and of the combine weights are made of.

    With g = grad[token] @ down[e] (rows, F) and hidden = act(up), recomputed: the gradient of up is
    combine * g * act'(up); the weighted rows are combine * hidden; the parts sum to <g, hidden>. So neither hidden nor
    the second projection's output has to be kept.

    Rows of no expert are not computed: they hold whatever the memory held, or zero for the identity.

    Args:
        grad_TD: gradient of the output, contiguous.
        down_NDF: second projection, with any strides.
        up_SH: what went into the activation, contiguous.
        combine_TK: combine weights, contiguous.
        pick_S: pick of each row.
        end_N: one past the last row of each expert.
        schedule: row blocks.
        formula: the activation.

    Returns:
        up_grad_SH, weighted_SF, and parts_PB by pick in float32.
    """
    num_rows, (num_experts, size_in, width) = pick_S.numel(), down_NDF.shape
    tile = tiles.choose("hidden_gradient", num_rows / num_experts, width, size_in, grad_TD.dtype, grad_TD.device)
    num_parts = triton.cdiv(width, tile.outs)
    allocate = torch.zeros_like if formula.activation == "identity" else torch.empty_like
    up_grad_SH = allocate(up_SH)
    weighted_SF = up_SH.new_empty(num_rows, width)
    parts_PB = up_SH.new_empty(num_rows, num_parts, dtype=torch.float32)
    _hidden_gradient[(schedule.num_blocks * num_parts,)](
        grad_TD,
        down_NDF,
        up_SH,
        combine_TK,
        up_grad_SH,
        weighted_SF,
        parts_PB,
        pick_S,
        end_N,
        schedule.expert_B,
        schedule.start_B,
        schedule.num_blocks,
        combine_TK.shape[1],
        size_in,
        width,
        num_parts,
        down_NDF.stride(0),
        down_NDF.stride(1),
        down_NDF.stride(2),
        formula.alpha,
        formula.limit,
        ACTIVATION=formula.activation,
        GATED=formula.gated,
        INTERLEAVED=formula.interleaved,
        BLOCK_ROWS=schedule.block_rows,
        BLOCK_OUT=tile.outs,
        BLOCK_IN=tile.inner,
        EVEN_IN=size_in % tile.inner == 0,
        EVEN_OUT=width % tile.outs == 0,
        GROUP_ROWS=tiles.GROUP_ROWS,
        PRECISION=dot_precision(grad_TD.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return up_grad_SH, weighted_SF, parts_PB


@triton.jit(do_not_specialize=["num_blocks"])
def _hidden_gradient(
    grad_ptr,
    weight_ptr,
    up_ptr,
    combine_ptr,
    up_grad_ptr,
    weighted_ptr,
    parts_ptr,
    pick_ptr,
    end_ptr,
    block_expert_ptr,
    block_start_ptr,
    num_blocks,
    top_k,
    size_in,
    width,
    num_parts,
    stride_expert,
    stride_in,
    stride_out,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN_IN: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_block, out_block = locate(tl.program_id(0), num_blocks, num_parts, GROUP_ROWS)
    expert = tl.load(block_expert_ptr + row_block).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(block_start_ptr + row_block) + tl.arange(0, BLOCK_ROWS)
    row_mask = row < tl.load(end_ptr + expert)
    pick = tl.load(pick_ptr + row, mask=row_mask, other=0).to(tl.int64)
    row = row.to(tl.int64)
    out = out_block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_mask = out < width
    inner = tl.arange(0, BLOCK_IN)
    hidden_grad = product(
        grad_ptr + (pick // top_k)[:, None] * size_in + inner[None, :],
        weight_ptr + expert * stride_expert + out[None, :] * stride_out + inner[:, None] * stride_in,
        row_mask, out_mask, size_in, 1, stride_in,
        BLOCK_ROWS, BLOCK_OUT, BLOCK_IN, EVEN_IN, EVEN_OUT, PRECISION,
    )  # fmt: skip
    combine = tl.load(combine_ptr + pick, mask=row_mask, other=0.0).to(tl.float32)
    first = out_block * BLOCK_OUT
    if BLOCK_OUT >= 64:
        # Half of the columns at a time, so that what the activation needs stays in registers.
        left, right = halves(hidden_grad, BLOCK_ROWS, BLOCK_OUT)
        part = _through_activation(
            left, combine, up_ptr, up_grad_ptr, weighted_ptr, row, row_mask, first, width, alpha, limit,
            ACTIVATION, GATED, INTERLEAVED, BLOCK_ROWS, BLOCK_OUT // 2,
        )  # fmt: skip
        part += _through_activation(
            right, combine, up_ptr, up_grad_ptr, weighted_ptr, row, row_mask, first + BLOCK_OUT // 2, width, alpha, limit,
            ACTIVATION, GATED, INTERLEAVED, BLOCK_ROWS, BLOCK_OUT // 2,
        )  # fmt: skip
    else:
        part = _through_activation(
            hidden_grad, combine, up_ptr, up_grad_ptr, weighted_ptr, row, row_mask, first, width, alpha, limit,
            ACTIVATION, GATED, INTERLEAVED, BLOCK_ROWS, BLOCK_OUT,
        )  # fmt: skip
    tl.store(parts_ptr + pick * num_parts + out_block, part, mask=row_mask)


@triton.jit
def _through_activation(
    hidden_grad,  # (BLOCK_ROWS, COLUMNS), before the combine weights
    combine,
    up_ptr,
    up_grad_ptr,
    weighted_ptr,
    row,
    row_mask,
    first,  # first column
    width,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the gradient of up and the weighted rows; the sum over columns of hidden_grad * hidden."""
    dtype = up_grad_ptr.dtype.element_ty
    out = first + tl.arange(0, COLUMNS)
    mask = row_mask[:, None] & (out < width)[None, :]
    weighted_grad = hidden_grad * combine[:, None]
    if INTERLEAVED:
        both = 2 * first + tl.arange(0, 2 * COLUMNS)
        both_mask = row_mask[:, None] & (both < 2 * width)[None, :]
        both_offset = row[:, None] * (2 * width) + both[None, :]
        pairs = tl.load(up_ptr + both_offset, mask=both_mask, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(pairs, (BLOCK_ROWS, COLUMNS, 2)))
        activated, scale = activate(gate, ACTIVATION, alpha, limit), factor(up, ACTIVATION, limit)
        hidden = activated * scale
        gate_grad = weighted_grad * scale * derivative(gate, ACTIVATION, alpha, limit)
        up_grad = weighted_grad * activated * factor_derivative(up, ACTIVATION, limit)
        pairs_grad = tl.reshape(tl.join(gate_grad.to(dtype), up_grad.to(dtype)), (BLOCK_ROWS, 2 * COLUMNS))
        tl.store(up_grad_ptr + both_offset, pairs_grad, mask=both_mask)
    elif GATED:
        offset = row[:, None] * (2 * width) + out[None, :]
        gate = tl.load(up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + offset + width, mask=mask, other=0.0).to(tl.float32)
        activated, scale = activate(gate, ACTIVATION, alpha, limit), factor(up, ACTIVATION, limit)
        hidden = activated * scale
        gate_grad = weighted_grad * scale * derivative(gate, ACTIVATION, alpha, limit)
        tl.store(up_grad_ptr + offset, gate_grad.to(dtype), mask=mask)
        up_grad = weighted_grad * activated * factor_derivative(up, ACTIVATION, limit)
        tl.store(up_grad_ptr + offset + width, up_grad.to(dtype), mask=mask)
    else:
        offset = row[:, None] * width + out[None, :]
        z = tl.load(up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        hidden = activate(z, ACTIVATION, alpha, limit)
        z_grad = weighted_grad * derivative(z, ACTIVATION, alpha, limit)
        tl.store(up_grad_ptr + offset, z_grad.to(dtype), mask=mask)
    tl.store(weighted_ptr + row[:, None] * width + out[None, :], (hidden * combine[:, None]).to(dtype), mask=mask)
    # Columns past the width are zero in the product, because their weights were masked.
    return tl.sum(hidden_grad * hidden, axis=1)
