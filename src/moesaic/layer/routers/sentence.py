"""Sentence-level routing: the tokens of a sequence share one decision."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Dependence, Router, check_top_k
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.scores import ScoreFunction, at, normalize, score, top_k


class SentenceConfig(BaseRouterConfig):
    """Fields of sentence-level routing (arXiv 2110.03742).

    Attributes:
        top_k: experts for each sequence (K).
        pool: what the gate reads. "sequence": the mean of the sequence's tokens, the paper's choice, made for encoders;
            "prefix": the mean of the tokens up to this one, which is causal but decides for each token anew; "first":
            the first token, one decision and causal.
        score_function: how logits become scores.
        normalize_top_k: divide the K weights by their sum.
    """

    type: Literal["sentence"] = "sentence"
    top_k: PositiveInt
    pool: Literal["sequence", "prefix", "first"] = "sequence"
    score_function: ScoreFunction = "softmax"
    normalize_top_k: bool = False

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        return frozenset({"later_tokens"} if self.pool == "sequence" else ())

    @property
    def unservable(self) -> str | None:
        if self.pool == "sequence":
            return super().unservable
        return "its gate reads hidden states of earlier tokens, which a cache does not hold"

    def check(self, num_experts: int) -> None:
        check_top_k(self.top_k, num_experts)

    def build(self, hidden_size: int, num_experts: int) -> SentenceRouter:
        self.check(num_experts)
        return SentenceRouter(self, hidden_size, num_experts)


class SentenceRouter(Router[SentenceConfig]):
    """Top-k on pooled tokens; padding is left out of the pool. Parameter: `weight` (N, D).

    A sequence is a row of the batch: documents packed into one row share its decision.
    """

    def __init__(self, config: SentenceConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, config.top_k)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        config = self.config
        logits_TN = linear(self._pooled(x_TD, context), self.weight)
        scores_TN = score(logits_TN, config.score_function)
        index_TK = top_k(scores_TN.detach(), config.top_k, stable=True)
        weight_TK = scores_TN.gather(-1, index_TK)
        if config.normalize_top_k:
            weight_TK = normalize(weight_TK)
        return Routing(
            index_TK=index_TK,
            weight_TK=weight_TK,
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=scores_TN.detach(),
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        weight_TK = at(routing.scores_TN, index_TK, kept_TK)
        return normalize(weight_TK) if self.config.normalize_top_k else weight_TK

    def _pooled(self, x_TD: Tensor, context: RoutingContext | None) -> Tensor:
        """What the gate reads for each token, (T, D); 0 where no real token has come yet."""
        batch = 1 if context is None else context.batch_size
        x_BLD = x_TD.to(self.precision(x_TD)).view(batch, -1, x_TD.shape[-1])
        real_BL1 = torch.ones_like(x_BLD[..., :1])
        if context is not None and context.mask_T is not None:
            real_BL1 = context.mask_T.view(batch, -1, 1).to(x_BLD.dtype)
            x_BLD = x_BLD.masked_fill(real_BL1 == 0, 0.0)  # padding may hold anything, also NaN
        if self.config.pool == "prefix":
            pooled_BLD = x_BLD.cumsum(1) / real_BL1.cumsum(1).clamp(min=1)
        elif self.config.pool == "first":
            first_BL1 = real_BL1 * (real_BL1.cumsum(1) == 1)
            pooled_BLD = (x_BLD * first_BL1).sum(1, keepdim=True).expand_as(x_BLD)
        else:
            mean_B1D = x_BLD.sum(1, keepdim=True) / real_BL1.sum(1, keepdim=True).clamp(min=1)
            pooled_BLD = mean_B1D.expand_as(x_BLD)
        return pooled_BLD.reshape(x_TD.shape)
