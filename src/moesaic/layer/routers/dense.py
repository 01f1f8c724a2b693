"""Dense gating: every expert runs for every token, weighted by a softmax."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Router, check_top_k
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.scores import ScoreFunction, at, keep_best, score


class DenseConfig(BaseRouterConfig):
    """Fields of dense gating.

    y = sum over all experts of softmax(W x)_i f_i(x) (Jacobs et al., Neural Computation 1991, "Adaptive mixtures of
    local experts"). With `evaluation_top_k` it is trained so and run sparsely, as in DS-MoE (arXiv 2404.05567).

    Attributes:
        score_function: how logits become weights; softmax rows sum to 1.
        linear_bias: give the logits' linear map a learned bias.
        evaluation_top_k: in evaluation a token runs only its so many best experts, weights unchanged; None for all.
    """

    type: Literal["dense"] = "dense"
    score_function: ScoreFunction = "softmax"
    linear_bias: bool = False
    evaluation_top_k: PositiveInt | None = None

    @property
    def may_skip(self) -> bool:
        return self.evaluation_top_k is not None

    @property
    def runs_all_experts(self) -> bool:
        return self.evaluation_top_k is None

    @property
    def refuses_capacity(self) -> str | None:
        return "in training every expert runs for every token, so that none can be full"

    def check(self, num_experts: int) -> None:
        if self.evaluation_top_k is not None:
            check_top_k(self.evaluation_top_k, num_experts, field="evaluation_top_k")

    def build(self, hidden_size: int, num_experts: int) -> DenseRouter:
        self.check(num_experts)
        return DenseRouter(self, hidden_size, num_experts)


class DenseRouter(Router[DenseConfig]):
    """All N experts for each token. Parameters: `weight` (N, D), and `bias` (N,) if configured.

    The record has N picks in the order of experts; experts that evaluation leaves out are picks of no expert.
    """

    def __init__(self, config: DenseConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.linear_bias else None
        self.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        logits_TN = linear(x_TD, self.weight, self.bias)
        scores_TN = score(logits_TN, self.config.score_function)
        index_TN = torch.arange(self.num_experts, device=x_TD.device).expand_as(scores_TN).contiguous()
        weight_TN = scores_TN
        if self.config.evaluation_top_k is not None and not self.training:
            index_TN, weight_TN = keep_best(scores_TN, self.config.evaluation_top_k, width=self.num_experts)
        return Routing(
            index_TK=index_TN,
            weight_TK=weight_TN,
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=scores_TN.detach(),
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        return at(routing.scores_TN, index_TK, kept_TK)

    @property
    def picks(self) -> float:
        """Experts that a token runs in evaluation."""
        return self.config.evaluation_top_k or self.num_experts
