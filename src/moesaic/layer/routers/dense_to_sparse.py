"""A gate that is dense at first and becomes sparse as its temperature falls."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.layer.load import LayerLoad
from moesaic.layer.noise import gumbel
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Dependence, Router, fill_buffer
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.scores import at
from moesaic.layer.schedule import NonNegativeSchedule, Schedule, Scheduled, value_at


class DenseToSparseConfig(BaseRouterConfig):
    """Fields of the dense-to-sparse gate (EvoMoE, arXiv 2112.14397).

    Attributes:
        temperature: of the softmax, a number or a schedule over the training; from high, where all experts run, to low,
            where few do.
        threshold: experts whose weight is below are dropped for that token; less than 1 / N, so that one always stays.
        noise: add Gumbel noise to the logits while training.
    """

    type: Literal["dense_to_sparse"] = "dense_to_sparse"
    temperature: Scheduled = NonNegativeSchedule(start=2.0, end=0.3, shape="exponential")
    threshold: float = Field(default=0.001, ge=0)
    noise: bool = True

    @model_validator(mode="after")
    def _positive(self) -> DenseToSparseConfig:
        values = (self.temperature,)
        if isinstance(self.temperature, Schedule):
            values = (self.temperature.start, self.temperature.end)
        for value in values:
            if value == 0:
                raise ConfigError("temperature", value, "divides the logits", "choose a number above 0")
        return self

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        return frozenset({"random_numbers"} if training and self.noise else ())

    @property
    def may_skip(self) -> bool:
        return True

    @property
    def refuses_capacity(self) -> str | None:
        return "the number of picks depends on the data, so that a capacity factor has nothing to multiply"

    def check(self, num_experts: int) -> None:
        if self.threshold * num_experts >= 1:
            raise ConfigError(
                "threshold",
                self.threshold,
                f"could drop all {num_experts} experts",
                f"choose less than 1/{num_experts}",
            )

    def build(self, hidden_size: int, num_experts: int) -> DenseToSparseRouter:
        self.check(num_experts)
        return DenseToSparseRouter(self, hidden_size, num_experts)


class DenseToSparseRouter(Router[DenseToSparseConfig]):
    """w = softmax((W x + Gumbel noise) / temperature), without the experts whose weight is below the threshold.

    The weights that stay are not renormalised. The record has N picks in the order of experts; a dropped expert is a
    pick of no expert. Its logits and scores are free of noise, its selection is not. Tensors: the parameter `weight`
    (N, D), and the buffer `temperature`, a float32 scalar that follows the schedule after each optimiser step.
    """

    temperature: Tensor
    full_precision = ("temperature",)

    def __init__(self, config: DenseToSparseConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("temperature", torch.empty((), dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, std=std)
        fill_buffer(self.temperature, torch.full_like(self.temperature, value_at(self.config.temperature, 0.0)))

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        logits_TN = linear(x_TD, self.weight)
        temperature = self.temperature.to(logits_TN.dtype)
        scores_TN = weight_TN = (logits_TN / temperature).softmax(-1)
        if self.training and self.config.noise:
            noise_TN = gumbel(context, self.layer, logits_TN.shape, stream=0, like=logits_TN)
            weight_TN = ((logits_TN + noise_TN) / temperature).softmax(-1)
        kept_TN = weight_TN.detach() >= self.config.threshold
        expert_N = torch.arange(self.num_experts, device=x_TD.device)
        return Routing(
            index_TK=torch.where(kept_TN, expert_N, self.num_experts),
            weight_TK=weight_TN * kept_TN,
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=weight_TN.detach(),
            basis_TN=None if weight_TN is scores_TN else weight_TN,
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        weights_TN = routing.scores_TN if routing.basis_TN is None else routing.basis_TN
        return at(weights_TN, index_TK, kept_TK)

    @torch.no_grad()
    def post_step(self, load: LayerLoad, progress: float) -> None:
        """Set the temperature of the next step."""
        self.temperature.fill_(value_at(self.config.temperature, progress))
