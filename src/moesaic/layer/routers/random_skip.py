"""Top-k whose last pick is left out at random: what skipping without looking at the token costs."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moesaic.layer.noise import uniform
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Dependence, Router, check_top_k
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.scores import top_k


class RandomSkipConfig(BaseRouterConfig):
    """Fields of top-k with a random last pick. Weights are a softmax over the logits of the picks that run.

    It is the control of routers that skip by content: a token runs as many experts as theirs on average, whatever it is.
    Without a source.

    Attributes:
        top_k: picks for each token (K), at least 2.
        keep: share of the tokens that run the last one of them, drawn anew in each layer, in evaluation too.
    """

    type: Literal["random_skip"] = "random_skip"
    top_k: int = Field(ge=2)
    keep: float = Field(gt=0, lt=1)

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        return frozenset({"random_numbers"})

    @property
    def may_skip(self) -> bool:
        return True

    @property
    def unranked(self) -> str | None:
        return "which experts a token skips is drawn, not ranked"

    def check(self, num_experts: int) -> None:
        check_top_k(self.top_k, num_experts)

    def build(self, hidden_size: int, num_experts: int) -> RandomSkipRouter:
        self.check(num_experts)
        return RandomSkipRouter(self, hidden_size, num_experts)


class RandomSkipRouter(Router[RandomSkipConfig]):
    """Linear logits and the K best experts, the least of which may be no expert. The parameter is `weight` (N, D).

    Balance losses count all K picks.
    """

    def __init__(self, config: RandomSkipConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, config.top_k)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        logits_TN = linear(x_TD, self.weight)
        scores_TN = logits_TN.softmax(-1)
        chosen_TK = top_k(logits_TN.detach(), self.top_k, stable=True)
        drawn_T = uniform(context, self.layer, (len(x_TD),), stream=0, like=logits_TN)
        skipped_TK = torch.zeros_like(chosen_TK, dtype=torch.bool)
        skipped_TK[:, -1] = drawn_T >= self.config.keep
        return Routing(
            index_TK=chosen_TK.masked_fill(skipped_TK, self.num_experts),
            weight_TK=logits_TN.gather(-1, chosen_TK).masked_fill(skipped_TK, float("-inf")).softmax(-1),
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=scores_TN.detach(),
            chosen_TK=chosen_TK,
        )

    @property
    def picks(self) -> float:
        """K - 1 + keep."""
        return self.top_k - 1 + self.config.keep
