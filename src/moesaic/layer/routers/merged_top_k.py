"""Merged top-k: each sequence picks K experts and passes one, their weighted sum (MEO)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import Dependence, Router, check_top_k
from moesaic.layer.routers.inputs import linear
from moesaic.layer.routers.merging import MergingConfig, merged_routing
from moesaic.layer.routers.scores import ScoreFunction, score, top_k
from moesaic.layer.routers.sequences import mean_of_tokens, real_tokens, sequences


class MergedTopKConfig(MergingConfig):
    """Fields of merging the selected experts (MEO, He et al., arXiv 2310.09832, section 3).

    Attributes:
        top_k: experts that are merged for a sequence (K).
        score_function: how the logits of the mean token become weights.
        normalize_top_k: divide the K weights by their sum. With K = 1 the weight is then 1 and teaches the router nothing.
        linear_bias: give the logits' linear map a learned bias.
    """

    type: Literal["merged_top_k"] = "merged_top_k"
    top_k: PositiveInt
    score_function: ScoreFunction = "softmax"
    normalize_top_k: bool = False
    linear_bias: bool = False

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        return frozenset({"later_tokens"})

    def check(self, num_experts: int) -> None:
        check_top_k(self.top_k, num_experts)

    def build(self, hidden_size: int, num_experts: int) -> MergedTopKRouter:
        self.check(num_experts)
        return MergedTopKRouter(self, hidden_size, num_experts)


class MergedTopKRouter(Router[MergedTopKConfig]):
    """K experts for each sequence, merged to one: weights and biases are summed, so that there is one activation.

    Parameters are `weight` (N, D) and, with `linear_bias`, `bias` (N,).
    """

    def __init__(self, config: MergedTopKConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, config.top_k)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.linear_bias else None
        self.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        config, (batch, length) = self.config, sequences(x_TD.shape[0], context)
        mask_BL = real_tokens(x_TD, context)
        x_BLD = x_TD.to(self.precision(x_TD)).view(batch, length, x_TD.shape[-1])
        logits_BSN = linear(mean_of_tokens(x_BLD, mask_BL), self.weight, self.bias).unsqueeze(1)
        scores_BSN = score(logits_BSN, config.score_function)
        index_BSK = top_k(scores_BSN.detach(), config.top_k, stable=True)
        weight_BSK = scores_BSN.gather(-1, index_BSK)
        if config.normalize_top_k:
            weight_BSK = weight_BSK / weight_BSK.sum(-1, keepdim=True)
        weight_BSN = torch.zeros_like(scores_BSN).scatter(-1, index_BSK, weight_BSK)
        return merged_routing(logits_BSN, scores_BSN, weight_BSN, mask_BL.unsqueeze(-1), index_BSK)

    @property
    def picks(self) -> float:
        return 1.0
