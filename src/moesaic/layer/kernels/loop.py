"""The specification of expert computation: one expert after the other, in any floating dtype, differentiable twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.layer.kernels.weights import ExpertWeights


def run(weights: ExpertWeights, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """y_t = sum over k of weight_tk * expert_{index_tk}(x_t); picks equal to N add nothing.

    Accumulates in at least float32 and casts once, to the dtype of `x_TD`.
    """
    accumulate = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros(x_TD.shape, dtype=accumulate, device=x_TD.device)
    for expert in range(weights.num_experts):
        token_S, pick_S = torch.where(index_TK == expert)
        up_bias = None if weights.up_bias_NH is None else weights.up_bias_NH[expert]
        down_bias = None if weights.down_bias_ND is None else weights.down_bias_ND[expert]
        hidden_SF = weights.activate(F.linear(x_TD[token_S], weights.up_NHD[expert], up_bias))
        rows_SD = F.linear(hidden_SF, weights.down_NDF[expert], down_bias)
        weighted_SD = rows_SD.to(accumulate) * weight_TK[token_S, pick_S, None].to(accumulate)
        y_TD = y_TD.index_add(0, token_S, weighted_SD)
    return y_TD.to(x_TD.dtype)
