"""Sums over the picks of a token, in float32 and in a fixed order."""

# Triton's types describe neither launches nor values inside kernels.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def sum_picks(rows_PO: Tensor, index_TK: Tensor, num_experts: int) -> Tensor:
    """Sum the K rows of each token. Rows of no expert are not read.

    Args:
        rows_PO: one row a pick, (T*K, O), contiguous.
        index_TK: picks; N stands for no expert.
        num_experts: N.

    Returns:
        y_TO in the dtype of the rows.
    """
    (tokens, top_k), outs = index_TK.shape, rows_PO.shape[1]
    y_TO = rows_PO.new_empty(tokens, outs)
    block = min(1024, triton.next_power_of_2(outs))
    _sum_picks[(tokens, triton.cdiv(outs, block))](rows_PO, index_TK, y_TO, num_experts, outs, TOP_K=top_k, BLOCK=block)
    return y_TO


@triton.jit
def _sum_picks(rows_ptr, index_ptr, y_ptr, num_experts, outs, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    out = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(TOP_K):
        pick = token * TOP_K + k
        size = tl.where(tl.load(index_ptr + pick) < num_experts, outs, 0)
        total += tl.load(rows_ptr + pick * outs + out, mask=out < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * outs + out, total.to(y_ptr.dtype.element_ty), mask=out < outs)


def combine_gradient(
    parts_PB: Tensor,
    grad_TD: Tensor,
    down_bias_ND: Tensor | None,
    index_TK: Tensor,
    num_experts: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the combine weights: <grad_t, down_e(hidden) + bias_e>, zero for picks of no expert.

    Args:
        parts_PB: <grad_t @ down_e, hidden> of each pick in B parts, float32; those of no expert are not read.
        grad_TD: gradient of the output, contiguous; read only if there is a bias.
        down_bias_ND: bias of the second projection, or None.
        index_TK: picks; N stands for no expert.
        num_experts: N.
        dtype: of the result.

    Returns:
        (T, K).
    """
    out_TK = torch.empty(index_TK.shape, dtype=dtype, device=parts_PB.device)
    num_parts, hidden_size = parts_PB.shape[1], grad_TD.shape[1]
    _combine_gradient[(index_TK.numel(),)](
        parts_PB,
        grad_TD,
        down_bias_ND,
        index_TK,
        out_TK,
        num_experts,
        num_parts,
        hidden_size,
        TOP_K=index_TK.shape[1],
        HAS_BIAS=down_bias_ND is not None,
        PARTS=triton.next_power_of_2(num_parts),
        BLOCK=min(1024, triton.next_power_of_2(hidden_size)),
        num_warps=1 if down_bias_ND is None else 4,
    )
    return out_TK


@triton.jit
def _combine_gradient(
    parts_ptr,
    grad_ptr,
    bias_ptr,
    index_ptr,
    out_ptr,
    num_experts,
    num_parts,
    hidden_size,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pick = tl.program_id(0).to(tl.int64)
    expert = tl.load(index_ptr + pick).to(tl.int64)
    part = tl.arange(0, PARTS)
    # A pick of no expert has no parts and no columns.
    size_parts = tl.where(expert < num_experts, num_parts, 0)
    total = tl.sum(tl.load(parts_ptr + pick * num_parts + part, mask=part < size_parts, other=0.0), axis=0)
    if HAS_BIAS:
        sums = tl.zeros((BLOCK,), dtype=tl.float32)
        size = tl.where(expert < num_experts, hidden_size, 0)
        for start in range(0, size, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < size
            grad = tl.load(grad_ptr + (pick // TOP_K) * hidden_size + column, mask=mask, other=0.0).to(tl.float32)
            bias = tl.load(bias_ptr + expert * hidden_size + column, mask=mask, other=0.0).to(tl.float32)
            sums += grad * bias
        total += tl.sum(sums, axis=0)
    tl.store(out_ptr + pick, total.to(out_ptr.dtype.element_ty))
