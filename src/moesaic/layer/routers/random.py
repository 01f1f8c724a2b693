"""Random routing: experts are drawn anew at every step, and nothing is learned."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from moesaic.layer.noise import uniform
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Dependence, Router, check_top_k
from moesaic.layer.routers.scores import top_k


class RandomConfig(BaseRouterConfig):
    """Fields of random routing (THOR, arXiv 2110.04260).

    Attributes:
        top_k: experts for each token while training (K), all different, each with weight 1 / K.
        unit: what draws: each "token", or each "sequence" for all its tokens.
        evaluation: "first": the first K experts, the cheapest model that was trained; "all": the mean of all experts
            (THOR's ensemble); "random": drawn as in training.
    """

    type: Literal["random"] = "random"
    top_k: PositiveInt
    unit: Literal["token", "sequence"] = "token"
    evaluation: Literal["first", "all", "random"] = "first"

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        return frozenset({"random_numbers"} if training or self.evaluation == "random" else ())

    @property
    def may_skip(self) -> bool:
        return self.evaluation == "all"

    @property
    def refuses_capacity(self) -> str | None:
        return "the mean of all experts leaves none to be full" if self.evaluation == "all" else None

    @property
    def unranked(self) -> str | None:
        return "experts are drawn or fixed, not ranked"

    def check(self, num_experts: int) -> None:
        check_top_k(self.top_k, num_experts)

    def build(self, hidden_size: int, num_experts: int) -> RandomRouter:
        self.check(num_experts)
        return RandomRouter(self, num_experts)


class RandomRouter(Router[RandomConfig]):
    """K experts at random. No parameters.

    With `evaluation: all` the record is N wide, in training too, where the picks beyond K are no expert.
    """

    def __init__(self, config: RandomConfig, num_experts: int) -> None:
        super().__init__(config, num_experts, num_experts if config.evaluation == "all" else config.top_k)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        drawn_TN = self._drawn(x_TD, context)
        k = self.config.top_k if self.training or self.config.evaluation != "all" else self.num_experts
        order_TK = top_k(drawn_TN, self.top_k, stable=True)
        kept_K = torch.arange(self.top_k, device=x_TD.device) < k
        index_TK = order_TK.masked_fill(~kept_K, self.num_experts)
        scores_TN = torch.zeros_like(drawn_TN).scatter(-1, order_TK, kept_K.to(drawn_TN.dtype).expand(order_TK.shape))
        return Routing(
            index_TK=index_TK,
            weight_TK=(kept_K.to(drawn_TN.dtype) / k).expand(order_TK.shape).contiguous(),
            logits_TN=torch.zeros_like(drawn_TN),
            scores_TN=scores_TN,
            selection_TN=drawn_TN,
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        return kept_TK.to(routing.scores_TN.dtype) / kept_TK.sum(-1, keepdim=True)

    def _drawn(self, x_TD: Tensor, context: RoutingContext | None) -> Tensor:
        """What the selection compares, (T, N); equal for all experts where nothing is drawn."""
        like, tokens = x_TD.new_empty(0, dtype=self.precision(x_TD)), len(x_TD)
        if "random_numbers" not in self.config.depends_on(self.training):
            return like.new_zeros(tokens, self.num_experts)
        if self.config.unit == "token":
            return uniform(context, self.layer, (tokens, self.num_experts), stream=0, like=like)
        batch = 1 if context is None else context.batch_size
        drawn_BN = uniform(context, self.layer, (batch, self.num_experts), stream=0, like=like)
        return drawn_BN.unsqueeze(1).expand(-1, tokens // batch, -1).reshape(tokens, self.num_experts)

    @property
    def picks(self) -> float:
        """Experts that a token runs in evaluation."""
        return self.top_k
