"""Logits that are standardised before softmax, so that the sharpness of the gate is a field and not an outcome."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.parts.best_k import BestKConfig, BestKRouter
from moesaic.layer.routers.parts.inputs import linear


class NormalisedConfig(BestKConfig):
    """Fields of gating logit normalisation (Skywork-MoE, arXiv 2406.06563).

    z = W x + b; z' = lambda (z - mean z) / std z over the N experts of the token; scores are those of z'. Without it, the
    gate tends towards uniform scores as training goes on, and experts towards each other.

    Attributes:
        scale: lambda, the standard deviation of a token's logits; larger is sharper.
        linear_bias: b.
        epsilon: added to the variance, for tokens whose logits are all equal.
    """

    type: Literal["normalised"] = "normalised"
    scale: float = Field(default=1.0, gt=0)
    linear_bias: bool = True
    epsilon: float = Field(default=1e-10, gt=0)

    def check(self, num_experts: int) -> None:
        super().check(num_experts)
        if num_experts == 1:
            raise ConfigError("type", self.type, "needs two experts: one logit has no deviation", "use top_k")

    def build(self, hidden_size: int, num_experts: int) -> NormalisedRouter:
        self.check(num_experts)
        return NormalisedRouter(self, hidden_size, num_experts)


class NormalisedRouter(BestKRouter[NormalisedConfig]):
    """`logits_TN` of the record are the standardised ones. Parameters are `weight` (N, D) and `bias` (N,)."""

    def __init__(self, config: NormalisedConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.linear_bias else None
        self.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        raw_TN = linear(x_TD, self.weight, self.bias)
        return self.take_best(self.config.scale * F.layer_norm(raw_TN, raw_TN.shape[-1:], eps=self.config.epsilon))
