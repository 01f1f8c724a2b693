"""Experts with trainable thresholds: a token runs every expert that it is close enough to (DYNMoE)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Router
from moesaic.layer.routers.parts.unit_vectors import cosine, init_orthogonal, sharpness
from moesaic.layer.routers.scores import top_k


class ThresholdConfig(BaseRouterConfig):
    """Fields of top-any gating (DYNMoE, arXiv 2405.14297, and its released code).

    s_i = sigmoid(cos(x, w_i) / tau) and t_i = sigmoid(G_i / tau); expert i runs if s_i > t_i, and the token's output is
    the mean of the experts that run. In evaluation the expert with the largest s_i runs if no other does; while
    training such a token runs none.

    The step function has the gradient of the identity ("straight through"), so an expert that runs moves its s_i and
    t_i by the gradient of its weight. The number of experts in the mean is a constant for the gradient.

    Attributes:
        max_experts: experts for each token at most, those furthest above their thresholds; N by default.
        temperature: tau at the start.
        max_scale: bound of 1 / tau.
    """

    type: Literal["threshold"] = "threshold"
    max_experts: PositiveInt | None = None
    temperature: float = Field(default=0.1, gt=0)
    max_scale: float = Field(default=100.0, gt=0)

    @model_validator(mode="after")
    def _temperature_learns(self) -> ThresholdConfig:
        if self.temperature < 1 / self.max_scale:
            raise ConfigError(
                "temperature",
                self.temperature,
                f"is below 1 / max_scale ({1 / self.max_scale:g}), so that no gradient would reach it",
                "raise it or max_scale",
            )
        return self

    @property
    def may_skip(self) -> bool:
        return True

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"diversity"})

    def check(self, num_experts: int) -> None:
        if self.max_experts is not None and self.max_experts > num_experts:
            raise ConfigError(
                "max_experts",
                self.max_experts,
                f"is larger than num_experts ({num_experts})",
                f"choose 1 to {num_experts}",
            )

    def build(self, hidden_size: int, num_experts: int) -> ThresholdRouter:
        self.check(num_experts)
        return ThresholdRouter(self, hidden_size, num_experts)


class ThresholdRouter(Router[ThresholdConfig]):
    """The record has `max_experts` columns, filled up with no expert; `auxiliary` holds the "diversity" loss.

    Parameters are `weight` (N, D), orthogonal at first, `threshold` (N,), 0 at first, and `log_scale` (1,), the
    logarithm of 1 / tau.
    """

    def __init__(self, config: ThresholdConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, config.max_experts or num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.threshold = nn.Parameter(torch.empty(num_experts))
        self.log_scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        init_orthogonal(self.weight)
        nn.init.zeros_(self.threshold)
        nn.init.constant_(self.log_scale, -math.log(self.config.temperature))

    @property
    def picks(self) -> float:
        """At the start, when thresholds stand at 0, half of the cosines exceed them."""
        return min(self.top_k, self.num_experts / 2)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        precision = self.precision(x_TD)
        weight_ND, threshold_N = self.weight.to(precision), self.threshold.to(precision)
        cosine_TN = cosine(x_TD.to(precision), weight_ND)
        scale_1 = sharpness(self.log_scale.to(precision), self.config.max_scale)
        logits_TN = cosine_TN * scale_1
        scores_TN = logits_TN.sigmoid()
        # s_i > t_i, compared where the sigmoids have not saturated.
        selection_TN = (cosine_TN - threshold_N).detach()
        index_TK = top_k(selection_TN, self.top_k, stable=True)
        runs_TK = selection_TN.gather(-1, index_TK) > 0
        if not self.training:
            first_TK = torch.arange(self.top_k, device=x_TD.device) == 0
            rescued_TK = first_TK & ~runs_TK[:, :1]
            index_TK = torch.where(rescued_TK, top_k(scores_TN.detach(), 1, stable=True), index_TK)
            runs_TK = runs_TK | rescued_TK
        return Routing(
            index_TK=index_TK.masked_fill(~runs_TK, self.num_experts),
            weight_TK=self._weights(scores_TN, threshold_N * scale_1, index_TK, runs_TK),
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=selection_TN,
            ragged=True,
            auxiliary={"diversity": expert_diversity(weight_ND).expand(x_TD.shape[0])},
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        precision = routing.scores_TN.dtype
        scale_1 = sharpness(self.log_scale.to(precision), self.config.max_scale)
        return self._weights(routing.scores_TN, self.threshold.to(precision) * scale_1, index_TK, kept_TK)

    def _weights(self, scores_TN: Tensor, threshold_N: Tensor, index_TK: Tensor, runs_TK: Tensor) -> Tensor:
        """The mean of the experts that run, with the gradient of how far each is above its threshold."""
        margin_TK = (scores_TN - threshold_N.sigmoid()).gather(-1, index_TK)
        step_TK = runs_TK + (margin_TK - margin_TK.detach())
        weight_TK = step_TK / runs_TK.sum(-1, keepdim=True).clamp(min=1)
        return weight_TK.masked_fill(~runs_TK, 0.0)


def expert_diversity(weight_ND: Tensor, live_N: Tensor | None = None) -> Tensor:
    """|cos(W, W) - 1|, which keeps experts apart, plus the mean length of their vectors, which keeps these small.

    DYNMoE, arXiv 2405.14297, in the form of the released code: Frobenius norm, sum of the two.

    Args:
        weight_ND: expert vectors.
        live_N: True for experts that exist; None for all. Others count for nothing in the first term.

    Returns:
        A scalar, 0 or more; its first term is 0 for orthogonal vectors.
    """
    apart_NN = cosine(weight_ND, weight_ND) - torch.eye(
        weight_ND.shape[0], dtype=weight_ND.dtype, device=weight_ND.device
    )
    if live_N is not None:
        apart_NN = apart_NN * (live_N.unsqueeze(-1) & live_N)
    # The root of 0 has no derivative; orthogonal vectors are where a fresh router starts.
    squares = apart_NN.square().sum()
    distance = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
    return distance + weight_ND.norm(dim=-1).mean()
