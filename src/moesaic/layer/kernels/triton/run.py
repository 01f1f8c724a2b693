"""The kernel function: what happens before and after the custom ops."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.layer.kernels.triton import autograd as _autograd  # registers the backward passes  # noqa: F401
from moesaic.layer.kernels.triton.formula import Formula
from moesaic.layer.kernels.triton.schedule import sort_picks
from moesaic.layer.kernels.weights import ExpertWeights

OPS = torch.ops.moesaic


def run_triton(weights: ExpertWeights, x_TD: Tensor, index_TK: Tensor, combine_TK: Tensor, *, atomic: bool) -> Tensor:
    """The same function as the `loop` kernel, within rounding; `x_TD` in the dtype to compute in.

    Args:
        weights: the experts.
        x_TD: hidden states.
        index_TK: picks in [0, N]; N stands for no expert.
        combine_TK: combine weights.
        atomic: sum the picks of a token with atomics, in no fixed order.
    """
    x_TD, index_TK, combine_TK = x_TD.contiguous(), index_TK.contiguous(), combine_TK.contiguous()
    up_NHD, down_NDF = weights.up_NHD.to(x_TD.dtype), weights.down_NDF.to(x_TD.dtype)
    up_bias_NH, down_bias_ND = _ready(weights.up_bias_NH, x_TD.dtype), _ready(weights.down_bias_ND, x_TD.dtype)
    leaves = (x_TD, combine_TK, up_NHD, down_NDF, up_bias_NH, down_bias_ND)
    needs_grad = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    if weights.fused is not None and not needs_grad:
        return OPS.triton_experts_inference(
            x_TD, up_NHD, down_NDF, up_bias_NH, down_bias_ND, index_TK, combine_TK, *Formula.of(weights.fused), atomic
        )
    pick_S, end_N = sort_picks(index_TK, weights.num_experts)
    if weights.fused is not None:
        y_TD, _ = OPS.triton_experts(
            x_TD,
            up_NHD,
            down_NDF,
            up_bias_NH,
            down_bias_ND,
            index_TK,
            combine_TK,
            pick_S,
            end_N,
            *Formula.of(weights.fused),
            atomic,
        )
        return y_TD
    up_SH = OPS.triton_gather_linear(x_TD, up_NHD, up_bias_NH, index_TK, pick_S, end_N, atomic)
    hidden_SF = weights.activate(up_SH).to(x_TD.dtype).contiguous()
    return OPS.triton_linear_scatter(hidden_SF, down_NDF, down_bias_ND, combine_TK, index_TK, pick_S, end_N, atomic)


def _ready(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype).contiguous()
