"""The kernels as torch custom ops, so that torch.compile, checkpointing and autocast see functions of tensors.

`moesaic::triton_experts` is the whole layer with its backward; `moesaic::triton_experts_inference` the same without one,
and with the path for few rows. An activation that the kernels don't know runs in torch between
`moesaic::triton_gather_linear` and `moesaic::triton_linear_scatter`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moesaic.layer.kernels.triton import tiles
from moesaic.layer.kernels.triton.decode import MAX_PICKS, decode
from moesaic.layer.kernels.triton.formula import IDENTITY, Formula
from moesaic.layer.kernels.triton.gather_linear import gather_linear
from moesaic.layer.kernels.triton.hidden_gradient import hidden_gradient
from moesaic.layer.kernels.triton.linear_scatter import linear_scatter
from moesaic.layer.kernels.triton.pick_sum import combine_gradient
from moesaic.layer.kernels.triton.schedule import Schedule, make_schedule, sort_picks
from moesaic.layer.kernels.triton.weight_gradient import bias_gradient, weight_gradient


def _op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """A custom op that launches on the device of its first tensor: Triton takes the current one."""

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def on_its_device(*args: Any) -> Any:
            with torch.cuda.device_of(args[0]):
                return function(*args)

        return torch.library.custom_op(name, on_its_device, mutates_args=())

    return decorate


def _schedule(pick_S: Tensor, end_N: Tensor, dtype: torch.dtype) -> Schedule:
    rows = pick_S.numel()
    return make_schedule(end_N, rows, tiles.block_rows(rows / end_N.numel(), dtype))


@_op("moesaic::triton_experts")
def triton_experts(
    x_TD: Tensor,
    up_NHD: Tensor,
    down_NDF: Tensor,
    up_bias_NH: Tensor | None,
    down_bias_ND: Tensor | None,
    index_TK: Tensor,
    combine_TK: Tensor,
    pick_S: Tensor,
    end_N: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    atomic: bool,
) -> tuple[Tensor, Tensor]:
    """y_TD, and up_SH, which the backward pass reads."""
    formula = Formula(activation, gated, interleaved, alpha, limit)
    if pick_S.numel() == 0:
        return torch.zeros_like(x_TD), x_TD.new_empty(0, up_NHD.shape[1])
    schedule = _schedule(pick_S, end_N, x_TD.dtype)
    hidden_SF, up_SH = gather_linear(
        x_TD, up_NHD, up_bias_NH, pick_S, end_N, index_TK.shape[1], schedule, formula, save_up=True
    )
    assert up_SH is not None
    y_TD = linear_scatter(
        hidden_SF, down_NDF, down_bias_ND, combine_TK, index_TK, pick_S, end_N, schedule, atomic=atomic
    )
    return y_TD, up_SH


@triton_experts.register_fake
def _(
    x_TD, up_NHD, down_NDF, up_bias_NH, down_bias_ND, index_TK, combine_TK, pick_S, end_N,
    activation, gated, interleaved, alpha, limit, atomic,
):  # fmt: skip
    return torch.empty_like(x_TD), x_TD.new_empty(pick_S.shape[0], up_NHD.shape[1])


@_op("moesaic::triton_experts_inference")
def triton_experts_inference(
    x_TD: Tensor,
    up_NHD: Tensor,
    down_NDF: Tensor,
    up_bias_NH: Tensor | None,
    down_bias_ND: Tensor | None,
    index_TK: Tensor,
    combine_TK: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    atomic: bool,
) -> Tensor:
    """y_TD; sorts picks itself, if there are enough of them."""
    formula = Formula(activation, gated, interleaved, alpha, limit)
    if index_TK.numel() == 0:
        return torch.zeros_like(x_TD)
    if index_TK.numel() <= MAX_PICKS:
        return decode(x_TD, up_NHD, down_NDF, up_bias_NH, down_bias_ND, index_TK, combine_TK, formula)
    pick_S, end_N = sort_picks(index_TK, up_NHD.shape[0])
    schedule = _schedule(pick_S, end_N, x_TD.dtype)
    hidden_SF, _ = gather_linear(
        x_TD, up_NHD, up_bias_NH, pick_S, end_N, index_TK.shape[1], schedule, formula, save_up=False
    )
    return linear_scatter(
        hidden_SF, down_NDF, down_bias_ND, combine_TK, index_TK, pick_S, end_N, schedule, atomic=atomic
    )


@triton_experts_inference.register_fake
def _(x_TD, *_):
    return torch.empty_like(x_TD)


@_op("moesaic::triton_gather_linear")
def triton_gather_linear(
    x_TD: Tensor,
    weight_NHD: Tensor,
    bias_NH: Tensor | None,
    index_TK: Tensor,
    pick_S: Tensor,
    end_N: Tensor,
    atomic: bool,
) -> Tensor:
    """x[token] @ weight[e].T + bias[e] in expert order (S, H); zero for rows of no expert.

    `atomic` is for the backward pass.
    """
    if pick_S.numel() == 0:
        return x_TD.new_empty(0, weight_NHD.shape[1])
    schedule = _schedule(pick_S, end_N, x_TD.dtype)
    return gather_linear(
        x_TD, weight_NHD, bias_NH, pick_S, end_N, index_TK.shape[1], schedule, IDENTITY, save_up=False
    )[0]


@triton_gather_linear.register_fake
def _(x_TD, weight_NHD, bias_NH, index_TK, pick_S, end_N, atomic):
    return x_TD.new_empty(pick_S.shape[0], weight_NHD.shape[1])


@_op("moesaic::triton_linear_scatter")
def triton_linear_scatter(
    rows_SF: Tensor,
    weight_NDF: Tensor,
    bias_ND: Tensor | None,
    combine_TK: Tensor | None,
    index_TK: Tensor,
    pick_S: Tensor,
    end_N: Tensor,
    atomic: bool,
) -> Tensor:
    """sum over the picks of each token of combine_tk * (row @ weight[e].T + bias[e]), (T, D)."""
    if pick_S.numel() == 0:
        return rows_SF.new_zeros(index_TK.shape[0], weight_NDF.shape[1])
    schedule = _schedule(pick_S, end_N, rows_SF.dtype)
    return linear_scatter(rows_SF, weight_NDF, bias_ND, combine_TK, index_TK, pick_S, end_N, schedule, atomic=atomic)


@triton_linear_scatter.register_fake
def _(rows_SF, weight_NDF, bias_ND, combine_TK, index_TK, pick_S, end_N, atomic):
    return rows_SF.new_empty(index_TK.shape[0], weight_NDF.shape[1])


@_op("moesaic::triton_hidden_gradient")
def triton_hidden_gradient(
    grad_TD: Tensor,
    down_NDF: Tensor,
    down_bias_ND: Tensor | None,
    up_SH: Tensor,
    index_TK: Tensor,
    combine_TK: Tensor,
    pick_S: Tensor,
    end_N: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of up_SH, the combine weights times the activated rows (S, F), and the gradient of the combine weights."""
    if pick_S.numel() == 0:
        return torch.empty_like(up_SH), up_SH.new_empty(0, down_NDF.shape[2]), torch.zeros_like(combine_TK)
    up_grad_SH, weighted_SF, parts_PB = hidden_gradient(
        grad_TD,
        down_NDF,
        up_SH,
        combine_TK,
        pick_S,
        end_N,
        _schedule(pick_S, end_N, grad_TD.dtype),
        Formula(activation, gated, interleaved, alpha, limit),
    )
    combine_grad_TK = combine_gradient(parts_PB, grad_TD, down_bias_ND, index_TK, end_N.numel(), combine_TK.dtype)
    return up_grad_SH, weighted_SF, combine_grad_TK


@triton_hidden_gradient.register_fake
def _(
    grad_TD, down_NDF, down_bias_ND, up_SH, index_TK, combine_TK, pick_S, end_N,
    activation, gated, interleaved, alpha, limit,
):  # fmt: skip
    return torch.empty_like(up_SH), up_SH.new_empty(up_SH.shape[0], down_NDF.shape[2]), torch.empty_like(combine_TK)


@_op("moesaic::triton_weight_gradient")
def triton_weight_gradient(
    left: Tensor, right: Tensor, pick_S: Tensor, end_N: Tensor, top_k: int, like_NOI: Tensor, gather_left: bool
) -> Tensor:
    """grad[e] = left.T @ right over the rows of expert e, (N, O, I); see `weight_gradient`."""
    if pick_S.numel() == 0:
        return torch.zeros_like(like_NOI)
    return weight_gradient(left, right, pick_S, end_N, top_k, like_NOI, gather_left=gather_left)


@triton_weight_gradient.register_fake
def _(left, right, pick_S, end_N, top_k, like_NOI, gather_left):
    return torch.empty_like(like_NOI)


@_op("moesaic::triton_bias_gradient")
def triton_bias_gradient(
    rows: Tensor, combine_TK: Tensor | None, pick_S: Tensor, end_N: Tensor, top_k: int, like_NO: Tensor
) -> Tensor:
    """grad[e] = sum over the rows of expert e, (N, O); see `bias_gradient`."""
    if pick_S.numel() == 0:
        return torch.zeros_like(like_NO)
    return bias_gradient(rows, combine_TK, pick_S, end_N, top_k, like_NO.dtype)


@triton_bias_gradient.register_fake
def _(rows, combine_TK, pick_S, end_N, top_k, like_NO):
    return torch.empty_like(like_NO)
