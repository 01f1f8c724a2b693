"""Expert prototyping: experts stand in groups, and each token takes the best of every group."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Router
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.scores import at, top_k


class PrototypedConfig(BaseRouterConfig):
    """Fields of expert prototyping (M6-T, arXiv 2105.15082).

    Z groups of N / Z experts, in index order. Each is a router of its own: softmax over the group, its K best by that
    score, which is their weight. K is 1 in the paper ("k top-1 routing" for Z = k).

    Attributes:
        num_groups: Z; a token runs Z times `top_k_in_group` experts.
        top_k_in_group: experts of each group.
    """

    type: Literal["prototyped"] = "prototyped"
    num_groups: PositiveInt
    top_k_in_group: PositiveInt = 1

    @property
    def unranked(self) -> str | None:
        return "each group of experts gives its own best, and groups are not ranked among each other"

    def check(self, num_experts: int) -> None:
        if num_experts % self.num_groups:
            divisors = [n for n in range(1, num_experts) if num_experts % n == 0]
            raise ConfigError(
                "num_groups", self.num_groups, f"does not divide num_experts ({num_experts})", f"choose from {divisors}"
            )
        size = num_experts // self.num_groups
        if size == 1:
            raise ConfigError(
                "num_groups",
                self.num_groups,
                "leaves one expert a group, whose weight is always 1",
                "give each group two experts or more",
            )
        if self.top_k_in_group > size:
            raise ConfigError(
                "top_k_in_group", self.top_k_in_group, f"is larger than a group ({size})", f"choose 1 to {size}"
            )

    def build(self, hidden_size: int, num_experts: int) -> PrototypedRouter:
        self.check(num_experts)
        return PrototypedRouter(self, hidden_size, num_experts)


class PrototypedRouter(Router[PrototypedConfig]):
    """Linear logits, softmax inside each group, and the best of each group. The parameter is `weight` (N, D)."""

    def __init__(self, config: PrototypedConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, config.num_groups * config.top_k_in_group)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        config, logits_TN = self.config, linear(x_TD, self.weight)
        scores_TGE = logits_TN.unflatten(-1, (config.num_groups, -1)).softmax(-1)
        scores_TN = scores_TGE.flatten(-2)
        inside_TGK = top_k(scores_TGE.detach(), config.top_k_in_group, stable=True)
        first_G1 = torch.arange(config.num_groups, device=x_TD.device).unsqueeze(-1) * scores_TGE.shape[-1]
        index_TK = (first_G1 + inside_TGK).flatten(-2)
        return Routing(
            index_TK=index_TK,
            weight_TK=scores_TN.gather(-1, index_TK),
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=scores_TN.detach(),
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        return at(routing.scores_TN, index_TK, kept_TK)
