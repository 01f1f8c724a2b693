"""Modality-conditioned experts: each modality routes in its own bank of experts."""

from __future__ import annotations

from itertools import accumulate
from typing import Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Need, Router, check_top_k
from moesaic.layer.routers.parts.inputs import ids_of, linear
from moesaic.layer.routers.scores import ScoreFunction, at, normalize, score, top_k

# Logit of experts outside a token's bank. The exponential of it is 0 in float64 also, and half precision can hold it.
OUTSIDE = -1e4


class ModalityConfig(BaseRouterConfig):
    """Fields of routing inside modality banks (ERNIE 4.5's modality-isolated routing).

    Attributes:
        banks: number of experts of each modality, in the order of modality ids; they lie one after another.
        shared: experts that every modality may pick beside its own; the last ones.
        top_k: experts for each token (K).
        score_function: how logits become scores, taken over the experts that the token may pick.
        selection_bias: add a per-expert bias, which no gradient reaches, to the scores for selection only.
        normalize_top_k: divide the K weights by their sum.
        normalization_floor: the least value of that sum (1e-12 in ERNIE 4.5).
        normalization_epsilon: added to that sum.
        scaling_factor: multiplies the weights.
    """

    type: Literal["modality"] = "modality"
    banks: tuple[PositiveInt, ...] = Field(min_length=1)
    shared: NonNegativeInt = 0
    top_k: PositiveInt
    score_function: ScoreFunction = "softmax"
    selection_bias: bool = False
    normalize_top_k: bool = False
    normalization_floor: float = Field(default=0.0, ge=0)
    normalization_epsilon: float = Field(default=0.0, ge=0)
    scaling_factor: float = 1.0

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"modality"})

    def check(self, num_experts: int) -> None:
        total = sum(self.banks) + self.shared
        if total != num_experts:
            raise ConfigError(
                "banks",
                self.banks,
                f"and shared ({self.shared}) hold {total} experts, not num_experts ({num_experts})",
                "make them add up",
            )
        check_top_k(self.top_k, min(self.banks) + self.shared, "the smallest bank with the shared experts")
        if not self.normalize_top_k and (self.normalization_floor or self.normalization_epsilon):
            raise ConfigError(
                "normalize_top_k", False, "leaves the floor and epsilon of the normalisation unread", "set it to true"
            )

    def build(self, hidden_size: int, num_experts: int) -> ModalityRouter:
        self.check(num_experts)
        return ModalityRouter(self, hidden_size, num_experts)


class ModalityRouter(Router[ModalityConfig]):
    """Top-k of the experts that a token's modality may pick.

    Tensors: the parameter `weight` (N, D), whose rows are the banks' gates one after another, and the buffer
    `e_score_correction_bias` (N,). In the record, experts outside the bank have score 0 and the logit `OUTSIDE`, so that
    neither the softmax nor a loss on the logits feels them. Padding counts as modality 0.
    """

    e_score_correction_bias: Tensor | None
    full_precision = ("e_score_correction_bias",)

    def __init__(self, config: ModalityConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, config.top_k)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        correction = torch.zeros(num_experts, dtype=torch.float32) if config.selection_bias else None
        self.register_buffer("e_score_correction_bias", correction)
        self.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        config = self.config
        outside_TN = ~self._allowed(ids_of(context, "modality", len(config.banks), field="banks"))
        logits_TN = linear(x_TD, self.weight).masked_fill(outside_TN, OUTSIDE)
        scores_TN = score(logits_TN, config.score_function).masked_fill(outside_TN, 0.0)
        selection_TN = scores_TN.detach()
        if self.e_score_correction_bias is not None:
            selection_TN = selection_TN + self.e_score_correction_bias
        selection_TN = selection_TN.masked_fill(outside_TN, float("-inf"))
        index_TK = top_k(selection_TN, config.top_k, stable=True)
        return Routing(
            index_TK=index_TK,
            weight_TK=self._weights(scores_TN, index_TK),
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=selection_TN,
        )

    @property
    def most_admitted(self) -> int:
        return max(self.config.banks) + self.config.shared

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        return self._weights(routing.scores_TN, index_TK, kept_TK)

    def _weights(self, scores_TN: Tensor, index_TK: Tensor, kept_TK: Tensor | None = None) -> Tensor:
        config, weight_TK = self.config, at(scores_TN, index_TK, kept_TK)
        if config.normalize_top_k:
            weight_TK = normalize(weight_TK, floor=config.normalization_floor, epsilon=config.normalization_epsilon)
        return weight_TK * config.scaling_factor

    def _allowed(self, modality_T: Tensor) -> Tensor:
        """Which experts each token may pick, (T, N)."""
        expert_N = torch.arange(self.num_experts, device=modality_T.device)
        bank_N = torch.zeros_like(expert_N)  # shared experts come out as one bank more
        for start in accumulate(self.config.banks):
            bank_N = bank_N + (expert_N >= start)
        return (bank_N == modality_T.unsqueeze(-1)) | (bank_N == len(self.config.banks))
