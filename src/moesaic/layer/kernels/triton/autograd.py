"""Backward passes of the custom ops, in terms of other custom ops. They are not differentiable twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.layer.kernels.triton import ops
from moesaic.layer.kernels.triton.formula import IDENTITY, Formula

OPS = torch.ops.moesaic


def _experts_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, activation, gated, interleaved, alpha, limit, atomic = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.formula, ctx.atomic = Formula(activation, gated, interleaved, alpha, limit), atomic
    # What is saved has no gradient, and none is to be made up for it.
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _experts_backward(ctx: Any, grad_TD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_TD is None:
        return (None,) * 15
    x_TD, up_NHD, down_NDF, up_bias, down_bias, index_TK, combine_TK, pick_S, end_N, up_SH = ctx.saved_tensors
    second = _scatter_gradients(
        ctx.needs_input_grad[2], ctx.needs_input_grad[4],
        grad_TD, down_NDF, down_bias, up_SH, index_TK, combine_TK, pick_S, end_N, ctx.formula,
    )  # fmt: skip
    up_grad_SH, down_grad, down_bias_grad, combine_grad = second
    x_grad, up_weight_grad, up_bias_grad = _gather_gradients(
        (*ctx.needs_input_grad[:2], ctx.needs_input_grad[3]),
        up_grad_SH, x_TD, up_NHD, up_bias, index_TK, pick_S, end_N, ctx.atomic,
    )  # fmt: skip
    gradients = (x_grad, up_weight_grad, down_grad, up_bias_grad, down_bias_grad, None, combine_grad)
    return gradients + (None,) * 8


def _scatter_gradients(
    needs_weight: bool,
    needs_bias: bool,
    grad_TD: Tensor,
    weight_NDF: Tensor,
    bias_ND: Tensor | None,
    up_SH: Tensor,
    index_TK: Tensor,
    combine_TK: Tensor,
    pick_S: Tensor,
    end_N: Tensor,
    formula: Formula,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradients of up_SH, of the second projection's weight and bias, and of the combine weights."""
    grad_TD, top_k = grad_TD.contiguous(), index_TK.shape[1]
    up_grad_SH, weighted_SF, combine_grad = OPS.triton_hidden_gradient(
        grad_TD, weight_NDF, bias_ND, up_SH, index_TK, combine_TK, pick_S, end_N, *formula
    )
    weight_grad = bias_grad = None
    if needs_weight:
        weight_grad = OPS.triton_weight_gradient(grad_TD, weighted_SF, pick_S, end_N, top_k, weight_NDF, True)
    if needs_bias:
        bias_grad = OPS.triton_bias_gradient(grad_TD, combine_TK, pick_S, end_N, top_k, bias_ND)
    return up_grad_SH, weight_grad, bias_grad, combine_grad


def _gather_gradients(
    needs: tuple[bool, bool, bool],
    up_grad_SH: Tensor,
    x_TD: Tensor,
    weight_NHD: Tensor,
    bias_NH: Tensor | None,
    index_TK: Tensor,
    pick_S: Tensor,
    end_N: Tensor,
    atomic: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the tokens and of the first projection's weight and bias."""
    x_grad = weight_grad = bias_grad = None
    top_k = index_TK.shape[1]
    if needs[0]:
        transposed_NDH = weight_NHD.transpose(1, 2)
        x_grad = OPS.triton_linear_scatter(up_grad_SH, transposed_NDH, None, None, index_TK, pick_S, end_N, atomic)
    if needs[1]:
        weight_grad = OPS.triton_weight_gradient(up_grad_SH, x_TD, pick_S, end_N, top_k, weight_NHD, False)
    if needs[2]:
        bias_grad = OPS.triton_bias_gradient(up_grad_SH, None, pick_S, end_N, top_k, bias_NH)
    return x_grad, weight_grad, bias_grad


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.atomic = inputs
    ctx.save_for_backward(*tensors)


def _gather_backward(ctx: Any, grad_SH: Tensor) -> tuple[Tensor | None, ...]:
    x_TD, weight_NHD, bias_NH, index_TK, pick_S, end_N = ctx.saved_tensors
    gradients = _gather_gradients(
        ctx.needs_input_grad[:3], grad_SH.contiguous(), x_TD, weight_NHD, bias_NH, index_TK, pick_S, end_N, ctx.atomic
    )
    return (*gradients, None, None, None, None)


def _scatter_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _scatter_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    rows_SF, weight_NDF, bias_ND, combine_TK, index_TK, pick_S, end_N = ctx.saved_tensors
    if combine_TK is None:
        raise NotImplementedError("triton_linear_scatter without combine weights is a gradient itself")
    needs_weight, needs_bias = ctx.needs_input_grad[1:3]
    rows_grad, weight_grad, bias_grad, combine_grad = _scatter_gradients(
        needs_weight, needs_bias, grad_TD, weight_NDF, bias_ND, rows_SF, index_TK, combine_TK, pick_S, end_N, IDENTITY
    )
    return rows_grad, weight_grad, bias_grad, combine_grad, None, None, None, None


ops.triton_experts.register_autograd(_experts_backward, setup_context=_experts_context)
ops.triton_gather_linear.register_autograd(_gather_backward, setup_context=_gather_context)
ops.triton_linear_scatter.register_autograd(_scatter_backward, setup_context=_scatter_context)
