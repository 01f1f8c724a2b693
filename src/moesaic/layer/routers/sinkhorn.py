"""Sinkhorn routing: in training, experts are picked by a plan that gives all the same load (S-BASE)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Dependence, Router, check_top_k
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.parts.plans import balanced_plan
from moesaic.layer.routers.parts.sequences import Scope, real_tokens
from moesaic.layer.routers.scores import ScoreFunction, at, score, top_k


class SinkhornConfig(BaseRouterConfig):
    """Fields of Sinkhorn routing (S-BASE, Clark et al., arXiv 2202.01169, section 3.1).

    In training a plan P maximises <logits, P> + temperature * H(P), where each token's shares sum to 1 and each
    expert's to the same number; a token takes the experts with its largest shares. Weights come from the scores, not
    from the plan. In evaluation a token takes the experts with its largest logits.

    Attributes:
        top_k: experts for each token (K); the paper has 1.
        score_function: how logits become the weights.
        iterations: rounds of Sinkhorn's algorithm.
        temperature: weight of the entropy; the smaller, the closer loads of the picks are to equal, and the more rounds
            it takes.
        scope: tokens that the plan shares out: those of the "batch", as in the paper, or of each "sequence".
        linear_bias: give the logits' linear map a learned bias.
    """

    type: Literal["sinkhorn"] = "sinkhorn"
    top_k: PositiveInt = 1
    score_function: ScoreFunction = "softmax"
    iterations: PositiveInt = 50
    temperature: float = Field(default=1.0, gt=0)
    scope: Scope = "batch"
    linear_bias: bool = False

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        if not training:
            return frozenset()
        return frozenset({"later_tokens"} if self.scope == "sequence" else {"later_tokens", "other_sequences"})

    def check(self, num_experts: int) -> None:
        check_top_k(self.top_k, num_experts)

    def build(self, hidden_size: int, num_experts: int) -> SinkhornRouter:
        self.check(num_experts)
        return SinkhornRouter(self, hidden_size, num_experts)


class SinkhornRouter(Router[SinkhornConfig]):
    """Linear logits; the experts of a token by `balanced_plan` in training and by the largest logits otherwise.

    `selection_TN` holds the logarithm of the plan in training. Parameters are `weight` (N, D) and, with `linear_bias`,
    `bias` (N,).
    """

    def __init__(self, config: SinkhornConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, config.top_k)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.linear_bias else None
        self.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        config, logits_TN = self.config, linear(x_TD, self.weight, self.bias)
        selection_TN = logits_TN.detach()
        if self.training:
            mask_GL = real_tokens(x_TD, context, config.scope)
            logits_GLN = selection_TN.view(*mask_GL.shape, self.num_experts) / config.temperature
            selection_TN = balanced_plan(logits_GLN, mask_GL, iterations=config.iterations).view_as(selection_TN)
        index_TK = top_k(selection_TN, config.top_k, stable=True)
        scores_TN = score(logits_TN, config.score_function)
        return Routing(
            index_TK=index_TK,
            weight_TK=scores_TN.gather(-1, index_TK),
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=selection_TN,
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        return at(routing.scores_TN, index_TK, kept_TK)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scope={self.config.scope}"
