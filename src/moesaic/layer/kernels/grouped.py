"""Sort once, run each expert on its contiguous rows, restore once.

The grouped product is a torch custom op, so `torch.compile(fullgraph=True)` sees no data-dependent shape, and its
backward writes every expert's gradient into one packed tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moesaic.layer.kernels.weights import ExpertWeights
from moesaic.layer.permutation import gather, order, restore


def run(weights: ExpertWeights, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The same function as the `loop` kernel, within rounding."""
    output_dtype = x_TD.dtype
    # Like torch's own linear, autocast leaves float64 alone.
    if torch.is_autocast_enabled(x_TD.device.type) and x_TD.dtype != torch.float64:
        x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
    by_expert = order(index_TK, weights.num_experts)
    rows_SD = gather(x_TD, by_expert)
    up_SH = _project(rows_SD, weights.up_NHD, weights.up_bias_NH, by_expert.counts_N)
    down_SD = _project(weights.activate(up_SH), weights.down_NDF, weights.down_bias_ND, by_expert.counts_N)
    return restore(down_SD, by_expert, weight_TK).to(output_dtype)


def _project(rows_SI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None, counts_N: Tensor) -> Tensor:
    bias_NO = None if bias_NO is None else bias_NO.to(rows_SI.dtype)
    return torch.ops.moesaic.grouped_linear(rows_SI, weight_NOI.to(rows_SI.dtype), bias_NO, counts_N)


def _segments(counts_N: Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, one past the last row) of every expert that has rows."""
    start = 0
    for expert, count in enumerate(counts_N.tolist()):
        if count:
            yield expert, start, start + count
            start += count


@torch.library.custom_op("moesaic::grouped_linear", mutates_args=())
def grouped_linear(rows_SI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None, counts_N: Tensor) -> Tensor:
    """rows @ weight[e].T + bias[e] for each expert's rows; rows past the counts' sum give zero. Returns (S, O)."""
    out_SO = rows_SI.new_zeros(rows_SI.shape[0], weight_NOI.shape[1])
    for expert, start, end in _segments(counts_N):
        rows, weight, out = rows_SI[start:end], weight_NOI[expert].t(), out_SO[start:end]
        if bias_NO is None:
            torch.mm(rows, weight, out=out)
        else:
            torch.addmm(bias_NO[expert], rows, weight, out=out)
    return out_SO


@torch.library.custom_op("moesaic::grouped_outer", mutates_args=())
def grouped_outer(left_SO: Tensor, right_SI: Tensor, counts_N: Tensor) -> Tensor:
    """left.T @ right over each expert's rows: the weight gradient of `grouped_linear`. Returns (N, O, I)."""
    out_NOI = left_SO.new_zeros(counts_N.numel(), left_SO.shape[1], right_SI.shape[1])
    for expert, start, end in _segments(counts_N):
        torch.mm(left_SO[start:end].t(), right_SI[start:end], out=out_NOI[expert])
    return out_NOI


@torch.library.custom_op("moesaic::grouped_sum", mutates_args=())
def grouped_sum(rows_SO: Tensor, counts_N: Tensor) -> Tensor:
    """The sum of each expert's rows, in float32 inside: the bias gradient of `grouped_linear`. Returns (N, O)."""
    out_NO = rows_SO.new_zeros(counts_N.numel(), rows_SO.shape[1])
    for expert, start, end in _segments(counts_N):
        torch.sum(rows_SO[start:end], 0, out=out_NO[expert])
    return out_NO


@grouped_linear.register_fake
def _(rows_SI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None, counts_N: Tensor) -> Tensor:
    return rows_SI.new_empty(rows_SI.shape[0], weight_NOI.shape[1])


@grouped_outer.register_fake
def _(left_SO: Tensor, right_SI: Tensor, counts_N: Tensor) -> Tensor:
    return left_SO.new_empty(counts_N.numel(), left_SO.shape[1], right_SI.shape[1])


@grouped_sum.register_fake
def _(rows_SO: Tensor, counts_N: Tensor) -> Tensor:
    return rows_SO.new_empty(counts_N.numel(), rows_SO.shape[1])


def _setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], output: Tensor) -> None:
    rows_SI, weight_NOI, _, counts_N = inputs
    ctx.save_for_backward(rows_SI, weight_NOI, counts_N)


def _backward(ctx, grad_SO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    rows_SI, weight_NOI, counts_N = ctx.saved_tensors
    grad_SO = grad_SO.contiguous()
    rows_grad = weight_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        rows_grad = torch.ops.moesaic.grouped_linear(grad_SO, weight_NOI.transpose(1, 2), None, counts_N)
    if ctx.needs_input_grad[1]:
        weight_grad = torch.ops.moesaic.grouped_outer(grad_SO, rows_SI, counts_N)
    if ctx.needs_input_grad[2]:
        bias_grad = torch.ops.moesaic.grouped_sum(grad_SO, counts_N)
    return rows_grad, weight_grad, bias_grad, None


grouped_linear.register_autograd(_backward, setup_context=_setup_context)
