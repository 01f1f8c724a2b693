"""Gradients of packed experts on CPU in native code.

Saved are the input, the routing and the rows of the first projection; everything else is computed again. Gradients of
weights are written once, straight into packed tensors, and only what is asked for is computed.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from moesaic.layer.kernels.native import library
from moesaic.layer.kernels.native.call import experts_call, is_transposed, order, rows_of, weight_rows_of
from moesaic.layer.kernels.native.kept import kept_or_fresh


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward pass reads of a call of `native_experts`."""
    x_TD, up_NHD, down_NDF, up_bias_NH, down_bias_ND, index_TK, weight_TK, *ctx.activation, _save_up = inputs
    saved_SH = output[1]
    ctx.mark_non_differentiable(saved_SH)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TD, up_NHD, down_NDF, up_bias_NH, down_bias_ND, index_TK, weight_TK, saved_SH)


def backward(ctx: Any, y_grad_TD: Tensor | None, _saved_grad: None) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of `native_experts`, None for those that need none."""
    x_needs, up_needs, down_needs, up_bias_needs, down_bias_needs, _index, weight_needs, *rest = ctx.needs_input_grad
    needs = [x_needs, up_needs, down_needs, up_bias_needs, down_bias_needs, weight_needs]
    if y_grad_TD is None or not any(needs):
        return (None,) * len(ctx.needs_input_grad)
    gradients = iter(torch.ops.moesaic.native_experts_backward(y_grad_TD, *ctx.saved_tensors, *ctx.activation, needs))
    x, up, down, up_bias, down_bias, weight = (next(gradients) if needed else None for needed in needs)
    return x, up, down, up_bias, down_bias, None, weight, *[None for _ in rest]


@torch.library.custom_op("moesaic::native_experts_backward", mutates_args=())
def native_experts_backward(
    y_grad_TD: Tensor,
    x_TD: Tensor,
    up_NHD: Tensor,
    down_NDF: Tensor,
    up_bias_NH: Tensor | None,
    down_bias_ND: Tensor | None,
    index_TK: Tensor,
    weight_TK: Tensor,
    saved_SH: Tensor,
    activation: int,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that are needed, of (x, up, down, up_bias, down_bias, weight), in this order."""
    x_TD, index_TK, weight_TK = rows_of(x_TD), index_TK.contiguous(), weight_TK.contiguous()
    y_grad_TD = rows_of(y_grad_TD.to(x_TD.dtype))
    up_NHD, down_NDF = weight_rows_of(up_NHD), weight_rows_of(down_NDF)
    x_needs, up_needs, down_needs, up_bias_needs, down_bias_needs, weight_needs = needs
    experts, hidden, _ = down_NDF.shape
    x_grad = torch.empty(x_TD.shape) if x_needs else None
    up_grad = _grad_of(up_NHD) if up_needs else None
    down_grad = _grad_of(down_NDF) if down_needs else None
    up_bias_grad = torch.empty(experts, up_NHD.shape[1]) if up_bias_needs else None
    down_bias_grad = torch.empty(experts, hidden) if down_bias_needs else None
    weight_grad = torch.zeros(weight_TK.shape) if weight_needs else None

    ordered = order(index_TK, experts)
    forward = experts_call(
        x_TD,
        up_NHD,
        down_NDF,
        up_bias_NH,
        down_bias_ND,
        ordered,
        weight_TK,
        activation,
        gated,
        interleaved,
        alpha,
        limit,
    )
    forward.saved_up = saved_SH.data_ptr()
    call = library.BackwardCall(
        forward,
        experts,
        y_grad_TD.data_ptr(),
        y_grad_TD.stride(0),
        *(None if out is None else out.data_ptr() for out in (weight_grad, x_grad, up_grad, down_grad)),
        *(None if out is None else out.data_ptr() for out in (up_bias_grad, down_bias_grad)),
    )
    if library.loaded().moesaic_experts_backward(ctypes.byref(call)) != 0:
        raise MemoryError(f"no memory for the gradients of {ordered.rows} rows of {down_NDF.shape[2]} features")
    gradients = (x_grad, up_grad, down_grad, up_bias_grad, down_bias_grad)
    return [out.to(x_TD.dtype) for out in gradients if out is not None] + ([] if weight_grad is None else [weight_grad])


def _grad_of(weight_NOI: Tensor) -> Tensor:
    """Memory for a weight's gradient, packed in the weight's own layout."""
    experts, outputs, inputs = weight_NOI.shape
    if is_transposed(weight_NOI):
        return kept_or_fresh((experts, inputs, outputs), weight_NOI).transpose(1, 2)
    return kept_or_fresh((experts, outputs, inputs), weight_NOI)


@native_experts_backward.register_fake
def _(
    y_grad_TD,
    x_TD,
    up_NHD,
    down_NDF,
    up_bias_NH,
    down_bias_ND,
    index_TK,
    weight_TK,
    saved_SH,
    activation,
    gated,
    interleaved,
    alpha,
    limit,
    needs,
):
    def like(weight_NOI: Tensor) -> Tensor:
        experts, outputs, inputs = weight_NOI.shape
        if is_transposed(weight_NOI):
            return weight_NOI.new_empty(experts, inputs, outputs).transpose(1, 2)
        return weight_NOI.new_empty(weight_NOI.shape)

    experts, hidden, _ = down_NDF.shape
    made = (
        lambda: x_TD.new_empty(x_TD.shape),
        lambda: like(up_NHD),
        lambda: like(down_NDF),
        lambda: x_TD.new_empty(experts, up_NHD.shape[1]),
        lambda: x_TD.new_empty(experts, hidden),
        lambda: weight_TK.new_empty(weight_TK.shape),
    )
    return [make() for make, needed in zip(made, needs, strict=True) if needed]
