"""Top-2 whose second expert is drawn at random while training: GShard's and DeepSpeed's ways to explore."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.layer.noise import gumbel, uniform
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Dependence, Router
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.scores import at, normalize, top_k


class SampledSecondConfig(BaseRouterConfig):
    """Fields of top-2 with a sampled second expert. Weights are softmax scores over all experts, divided by their sum.

    Attributes:
        policy: what is random while training. "dispatch": the second best expert runs only if 2 g2 > u, with g2 its weight
            and u uniform in (0, 1); otherwise the token has one expert, whose weight stays g1 (GShard, arXiv
            2006.16668, algorithm 1). "gumbel": the second expert is drawn from the softmax over all but the best, and
            always runs (DeepSpeed's top2_2nd_expert_sampling). Evaluation takes the two best.
    """

    type: Literal["sampled_second"] = "sampled_second"
    policy: Literal["dispatch", "gumbel"] = "dispatch"

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        return frozenset({"random_numbers"} if training else ())

    @property
    def may_skip(self) -> bool:
        return self.policy == "dispatch"

    def check(self, num_experts: int) -> None:
        if num_experts < 2:
            raise ConfigError("type", self.type, f"needs two experts, not num_experts = {num_experts}", "use top_k")

    def build(self, hidden_size: int, num_experts: int) -> SampledSecondRouter:
        self.check(num_experts)
        return SampledSecondRouter(self, hidden_size, num_experts)


class SampledSecondRouter(Router[SampledSecondConfig]):
    """Linear logits, the best expert of each token, and a second one.

    The first column of the record is the best expert. The parameter is `weight` (N, D).
    """

    def __init__(self, config: SampledSecondConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, 2)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        logits_TN = linear(x_TD, self.weight)
        scores_TN = logits_TN.softmax(-1)
        selection_TN = logits_TN.detach()
        if self.training and self.config.policy == "gumbel":
            selection_TN = self._draw(selection_TN, context)
        index_TK = top_k(selection_TN, 2, stable=True)
        weight_TK = normalize(scores_TN.gather(-1, index_TK))
        if self.training and self.config.policy == "dispatch":
            unit_T = uniform(context, self.layer, weight_TK.shape[:1], stream=0, like=weight_TK)
            skip_T = 2 * weight_TK[:, 1].detach() <= unit_T
            skip_TK = torch.stack([torch.zeros_like(skip_T), skip_T], dim=-1)
            index_TK = index_TK.masked_fill(skip_TK, self.num_experts)
            weight_TK = weight_TK.masked_fill(skip_TK, 0.0)
        return Routing(
            index_TK=index_TK,
            weight_TK=weight_TK,
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=selection_TN,
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        # A token whose second expert did not run keeps the weight that its first has beside the best of the others.
        scores_TN, weight_TK = routing.scores_TN, at(routing.scores_TN, index_TK, kept_TK)
        first_TK = index_TK.masked_fill(~kept_TK, self.num_experts)
        others_TN = F.pad(scores_TN, (0, 1)).scatter(-1, first_TK, 0.0)
        second_T1 = others_TN.amax(-1, keepdim=True)
        alone_T1 = kept_TK.sum(-1, keepdim=True) == 1
        total_T1 = weight_TK.sum(-1, keepdim=True)
        return weight_TK / torch.where(alone_T1, total_T1 + second_T1, total_T1)

    def _draw(self, logits_TN: Tensor, context: RoutingContext | None) -> Tensor:
        """Logits with Gumbel noise on all but the best, whose value stays above every other."""
        noisy_TN = logits_TN + gumbel(context, self.layer, logits_TN.shape, stream=0, like=logits_TN)
        best_T1 = top_k(logits_TN, 1, stable=True)
        return noisy_TN.scatter(-1, best_T1, noisy_TN.amax(-1, keepdim=True) + 1)
