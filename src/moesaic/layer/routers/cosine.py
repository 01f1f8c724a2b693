"""Cosine routing: tokens and experts meet on a low-dimensional unit sphere, with a learned temperature (X-MoE)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.layer.load import LayerLoad
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.parts.best_k import BestKConfig, BestKRouter
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.parts.unit_vectors import cosine, init_orthogonal, sharpness, unit

_TEMPERATURE = {"softmax": 0.3, "sigmoid": 0.07}
# Of torchscale: width of the projection, and the length and gain with which its expert vectors are kept and start.
_RELEASED_WIDTH, _RELEASED_LENGTH, _RELEASED_GAIN = 16, 1.5, 0.32


class CosineConfig(BestKConfig):
    """Fields of cosine routing.

    "paper" (X-MoE, arXiv 2204.09179): s_i = cos(W h, e_i); scores are the score function of s / tau with a
    learned tau; balance losses see softmax(s / tau0) with a fixed tau0. Tutel's gate is `projection_size: 256`,
    `projection_bias: true`, `temperature: 0.5`, `balance_temperature: learned`.

    "released" (torchscale): s_i = (W h) . e_i / |e_i|, where the token is not normalised, nothing divides s, and balance
    losses see the scores. After each step expert vectors get length 1.5, which sets how far a gradient step turns them.

    Attributes:
        form: "paper" or "released".
        projection_size: rows of W; N / 2 by default, 16 in the released form.
        projection_bias: add a learned vector to W h.
        temperature: tau at the start; 0.3 by default for softmax scores, 0.07 for sigmoid.
        max_scale: bound of 1 / tau.
        balance_temperature: tau0; 0.3 by default for softmax scores, 0.07 for sigmoid. "learned" shows balance losses
            the scores of the gate.
    """

    type: Literal["cosine"] = "cosine"
    form: Literal["paper", "released"] = "paper"
    projection_size: PositiveInt | None = None
    projection_bias: bool = False
    temperature: PositiveFloat | None = None
    max_scale: float = Field(default=100.0, gt=0)
    balance_temperature: PositiveFloat | Literal["learned"] | None = None

    @model_validator(mode="after")
    def _temperature_is_used(self) -> CosineConfig:
        if self.form == "released":
            for field in ("temperature", "max_scale", "balance_temperature"):
                value = getattr(self, field)
                if value != type(self).model_fields[field].default:
                    raise ConfigError(field, value, "has no effect in the released form", "leave it out")
        elif self.initial_temperature < 1 / self.max_scale:
            raise ConfigError(
                "temperature",
                self.initial_temperature,
                f"is below 1 / max_scale ({1 / self.max_scale:g}), so that no gradient would reach it",
                "raise it or max_scale",
            )
        return self

    @property
    def initial_temperature(self) -> float:
        """tau at the start."""
        return self.temperature or _TEMPERATURE[self.score_function]

    def build(self, hidden_size: int, num_experts: int) -> CosineRouter:
        self.check(num_experts)
        return CosineRouter(self, hidden_size, num_experts)


class CosineRouter(BestKRouter[CosineConfig]):
    """Parameters are `projection_weight` (d, D), `projection_bias` (d,), `weight` (N, d), the expert vectors, and
    `log_scale` (1,), the logarithm of 1 / tau, in the paper's form. `logits_TN` of the record are s / tau.
    """

    def __init__(self, config: CosineConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts)
        released = config.form == "released"
        width = config.projection_size or (_RELEASED_WIDTH if released else max(num_experts // 2, 1))
        self.projection_weight = nn.Parameter(torch.empty(width, hidden_size))
        self.projection_bias = nn.Parameter(torch.empty(width)) if config.projection_bias else None
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.log_scale = None if released else nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        super().reset_parameters(std)
        if self.log_scale is None:
            init_orthogonal(self.weight, gain=_RELEASED_GAIN)
        else:
            nn.init.constant_(self.log_scale, -math.log(self.config.initial_temperature))

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        config, low_TE = self.config, linear(x_TD, self.projection_weight, self.projection_bias)
        weight_NE = self.weight.to(low_TE.dtype)
        if self.log_scale is None:
            return self.take_best(linear(low_TE, unit(weight_NE)))
        cosine_TN = cosine(low_TE, weight_NE)
        logits_TN = cosine_TN * sharpness(self.log_scale.to(low_TE.dtype), config.max_scale)
        # Compared as cosines: sigmoids of sharp logits are equal in float32.
        routing = self.take_best(logits_TN, compared_TN=cosine_TN)
        if config.balance_temperature == "learned":
            return routing
        fixed = config.balance_temperature or _TEMPERATURE[config.score_function]
        return replace(routing, scores_TN=(cosine_TN / fixed).softmax(-1))

    def post_step(self, load: LayerLoad, progress: float) -> None:
        if self.config.form == "released":
            with torch.no_grad():
                self.weight.copy_(_RELEASED_LENGTH * unit(self.weight.to(self.precision(self.weight))))
