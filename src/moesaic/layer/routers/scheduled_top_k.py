"""Top-k routing whose k changes over the training, on a learned gate or on one that stays random."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.layer.load import LayerLoad
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Router, check_top_k, fill_buffer
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.scores import ScoreFunction, at, keep_best, normalize, score
from moesaic.layer.schedule import Schedule, Scheduled, value_at


class ScheduledTopKConfig(BaseRouterConfig):
    """Fields of top-k routing with a scheduled k.

    Attributes:
        top_k: experts for each token (K), a whole number or a schedule between two over the training.
        frozen: the gate keeps its random weights (SMoE-Dropout, arXiv 2303.01610).
        evaluation_top_k: experts for each token in evaluation, at any time; None for as many as in training.
        score_function: how logits become scores.
        normalize_top_k: divide the weights of a token by their sum.
    """

    type: Literal["scheduled_top_k"] = "scheduled_top_k"
    top_k: Scheduled
    frozen: bool = False
    evaluation_top_k: PositiveInt | None = None
    score_function: ScoreFunction = "softmax"
    normalize_top_k: bool = False

    @model_validator(mode="after")
    def _whole(self) -> ScheduledTopKConfig:
        for name, value in self._ends().items():
            if value < 1 or value != int(value):
                raise ConfigError(name, value, "is not a number of experts", "choose a whole number of at least 1")
        return self

    @property
    def may_skip(self) -> bool:
        ends = {*self._ends().values(), self.evaluation_top_k} - {None}
        return len(ends) > 1

    @property
    def refuses_capacity(self) -> str | None:
        return (
            "its number of picks changes, so that a capacity factor has nothing to multiply" if self.may_skip else None
        )

    @property
    def width(self) -> int:
        """The most experts that a token ever picks."""
        return max(int(max(self._ends().values())), self.evaluation_top_k or 1)

    def at(self, progress: float) -> int:
        """K when this share of the training is done, halves rounded up."""
        return int(value_at(self.top_k, progress) + 0.5)

    def _ends(self) -> dict[str, float]:
        if isinstance(self.top_k, Schedule):
            return {"top_k.start": self.top_k.start, "top_k.end": self.top_k.end}
        return {"top_k": self.top_k}

    def check(self, num_experts: int) -> None:
        for name, value in self._ends().items():
            check_top_k(int(value), num_experts, field=name)
        if self.evaluation_top_k is not None:
            check_top_k(self.evaluation_top_k, num_experts, field="evaluation_top_k")

    def build(self, hidden_size: int, num_experts: int) -> ScheduledTopKRouter:
        self.check(num_experts)
        return ScheduledTopKRouter(self, hidden_size, num_experts)


class ScheduledTopKRouter(Router[ScheduledTopKConfig]):
    """The K best experts of each token, K following a schedule.

    The record is as wide as the largest K; picks beyond the present one are no expert. Tensors: the parameter `weight`
    (N, D), and the buffer `current_top_k`, an int64 scalar that follows the schedule after each optimiser step.
    """

    current_top_k: Tensor

    def __init__(self, config: ScheduledTopKConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, config.width)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("current_top_k", torch.empty((), dtype=torch.int64))
        self.reset_parameters()
        self.freeze()

    def freeze(self) -> None:
        self.weight.requires_grad_(not self.config.frozen)

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, std=std)
        fill_buffer(self.current_top_k, torch.full_like(self.current_top_k, self.config.at(0.0)))

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        config = self.config
        logits_TN = linear(x_TD, self.weight)
        scores_TN = score(logits_TN, config.score_function)
        k = self.current_top_k if self.training or config.evaluation_top_k is None else config.evaluation_top_k
        index_TK, weight_TK = keep_best(scores_TN, k, width=self.top_k)
        if config.normalize_top_k:
            weight_TK = normalize(weight_TK)
        return Routing(
            index_TK=index_TK,
            weight_TK=weight_TK,
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=scores_TN.detach(),
            ragged=config.may_skip,
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        weight_TK = at(routing.scores_TN, index_TK, kept_TK)
        return normalize(weight_TK) if self.config.normalize_top_k else weight_TK

    @torch.no_grad()
    def post_step(self, load: LayerLoad, progress: float) -> None:
        """Set K of the next step."""
        self.current_top_k.fill_(self.config.at(progress))

    @property
    def picks(self) -> float:
        """Experts that a token runs in evaluation when the training is done."""
        return self.config.evaluation_top_k or self.config.at(1.0)
