"""Token-choice top-k routing, with every choice in which published families differ as a named field."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.layer.noise import uniform
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Dependence, Router, check_top_k
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.scores import (
    GroupScore,
    ScoreFunction,
    at,
    limit_to_groups,
    normalize,
    score,
    softmax_over,
    top_k,
)


class TopKConfig(BaseRouterConfig):
    """Fields of token-choice top-k routing.

    The defaults are DeepSeekMoE's (arXiv 2401.06066, eq. 9-11): softmax over all experts, no renormalisation.

    Attributes:
        top_k: experts for each token (K).
        score_function: how logits become scores.
        softmax_over: "all" experts before selection, or the "selected" logits after it (gpt-oss, Granite). "selected"
            equals "all" with `normalize_top_k`, in values and gradients.
        normalize_top_k: divide the K weights by their sum.
        normalization_order: divide by their L_p norm with this p instead; 1 is the sum (DBRX).
        normalization_floor: the least value of that sum or norm (1e-12 in ERNIE 4.5).
        normalization_epsilon: added to that sum or norm (1e-20 in DeepSeek-V3).
        scaling_factor: multiplies the weights (2.5 in DeepSeek-V3).
        expert_scale: multiply each weight last by a learned factor of its expert, 1 at first (Gemma 4).
        selection_bias: add a per-expert bias, which no gradient reaches, to what is compared in selection only
            (`e_score_correction_bias`; arXiv 2408.15664).
        select_by: compare the "scores", or the "logits". The two differ under a selection bias, and where scores
            saturate: the sigmoids of logits above 17 are equal in float32.
        linear_bias: give the logits' linear map a learned bias (gpt-oss).
        input_jitter: in training, multiply the router's input by independent uniform numbers from 1 - input_jitter to
            1 + input_jitter (Switch Transformers, arXiv 2101.03961, appendix C). Experts see the input as it is.
        input_norm: divide the router's input by its root mean square first (Gemma 4).
        input_norm_epsilon: added to that mean square.
        input_scale: then multiply it by a learned vector, 1 at first (Gemma 4).
        logit_scale: multiplies the logits.
        logit_softcap: bound the logits by this c: c * tanh(logits / c). None for no bound.
        num_groups: experts stand in this many equal groups; None for no group limit.
        top_k_groups: groups that a token may use.
        group_score: a group's score is the "max" of its experts (DeepSeek-V2) or the "top2_sum" (DeepSeek-V3).
        group_mask_value: what experts outside those groups compare with: "-inf", or "zero" as in older
            implementations, where a masked expert beats an allowed one whose biased score is negative.
        stable_ties: equal scores go to the lower index; otherwise the device decides.
    """

    type: Literal["top_k"] = "top_k"
    top_k: PositiveInt
    score_function: ScoreFunction = "softmax"
    softmax_over: Literal["all", "selected"] = "all"
    normalize_top_k: bool = False
    normalization_order: float = Field(default=1.0, gt=0)
    normalization_floor: float = Field(default=0.0, ge=0)
    normalization_epsilon: float = Field(default=0.0, ge=0)
    scaling_factor: float = 1.0
    expert_scale: bool = False
    selection_bias: bool = False
    select_by: Literal["scores", "logits"] = "scores"
    linear_bias: bool = False
    input_jitter: float = Field(default=0.0, ge=0, lt=1)
    input_norm: bool = False
    input_norm_epsilon: float = Field(default=1e-6, ge=0)
    input_scale: bool = False
    logit_scale: float = Field(default=1.0, gt=0)
    logit_softcap: float | None = Field(default=None, gt=0)
    num_groups: PositiveInt | None = None
    top_k_groups: PositiveInt | None = None
    group_score: GroupScore = "max"
    group_mask_value: Literal["-inf", "zero"] = "-inf"
    stable_ties: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> TopKConfig:
        if self.softmax_over == "selected" and self.score_function != "softmax":
            raise ConfigError(
                "softmax_over", "selected", f"needs softmax scores, not {self.score_function}", "leave it at `all`"
            )
        for field in ("normalization_order", "normalization_floor"):
            value = getattr(self, field)
            if not self.normalize_top_k and value != type(self).model_fields[field].default:
                raise ConfigError(field, value, "has no effect without normalize_top_k", "set normalize_top_k: true")
        if (self.num_groups is None) != (self.top_k_groups is None):
            raise ConfigError(
                "top_k_groups" if self.top_k_groups is None else "num_groups",
                None,
                "is missing: num_groups and top_k_groups go together",
                "set both or neither",
            )
        if self.num_groups is not None and self.top_k_groups is not None and self.top_k_groups > self.num_groups:
            raise ConfigError(
                "top_k_groups", self.top_k_groups, "is larger than num_groups", f"choose 1 to {self.num_groups}"
            )
        return self

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        return frozenset({"random_numbers"} if training and self.input_jitter else ())

    def check(self, num_experts: int) -> None:
        check_top_k(self.top_k, num_experts)
        if self.num_groups is None or self.top_k_groups is None:
            return
        if num_experts % self.num_groups:
            divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
            raise ConfigError(
                "num_groups", self.num_groups, f"does not divide num_experts ({num_experts})", f"choose from {divisors}"
            )
        group_size = num_experts // self.num_groups
        if self.group_score == "top2_sum" and group_size < 2:
            raise ConfigError(
                "num_groups", self.num_groups, "leaves one expert a group, too few for top2_sum", "use group_score: max"
            )
        if self.top_k_groups * group_size < self.top_k:
            raise ConfigError(
                "top_k_groups",
                self.top_k_groups,
                f"groups of {group_size} hold fewer than top_k ({self.top_k}) experts",
                f"choose {math.ceil(self.top_k / group_size)} to {self.num_groups}",
            )

    def build(self, hidden_size: int, num_experts: int) -> TopKRouter:
        self.check(num_experts)
        return TopKRouter(self, hidden_size, num_experts)


class TopKRouter(Router[TopKConfig]):
    """Linear logits, a score function, and the K best experts of each token.

    Parameters are named as in transformers: `weight` (N, D), `bias` (N,), `scale` (D,) of the input and
    `per_expert_scale` (N,) of the weights, and the buffer `e_score_correction_bias` (N,), which stays float32 when the
    module is cast.
    """

    e_score_correction_bias: Tensor | None
    full_precision = ("e_score_correction_bias",)

    def __init__(self, config: TopKConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, config.top_k)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.linear_bias else None
        self.scale = nn.Parameter(torch.empty(hidden_size)) if config.input_scale else None
        self.per_expert_scale = nn.Parameter(torch.empty(num_experts)) if config.expert_scale else None
        correction = torch.zeros(num_experts, dtype=torch.float32) if config.selection_bias else None
        self.register_buffer("e_score_correction_bias", correction)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        super().reset_parameters(std)
        for scale in (self.scale, self.per_expert_scale):
            if scale is not None:
                nn.init.ones_(scale)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        config = self.config
        logits_TN = self._logits(x_TD, context)
        scores_TN = score(logits_TN, config.score_function)
        index_TK, selection_TN = self._select(logits_TN if config.select_by == "logits" else scores_TN)
        return Routing(
            index_TK=index_TK,
            weight_TK=self._weights(logits_TN, scores_TN, index_TK),
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=selection_TN,
        )

    def admitted(self, routing: Routing) -> Tensor:
        if self.config.group_mask_value == "zero" and self.config.num_groups is not None:
            # Sigmoids and softmax shares are not 0; with a bias one may be, about once in 2^23 times.
            return (routing.selection_TN != 0) & super().admitted(routing)
        return super().admitted(routing)

    @property
    def most_admitted(self) -> int:
        if self.config.num_groups is None or self.config.top_k_groups is None:
            return self.num_experts
        return self.config.top_k_groups * (self.num_experts // self.config.num_groups)

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        return self._weights(routing.logits_TN, routing.scores_TN, index_TK, kept_TK)

    def _weights(self, logits_TN: Tensor, scores_TN: Tensor, index_TK: Tensor, kept_TK: Tensor | None = None) -> Tensor:
        config = self.config
        if config.softmax_over == "selected":
            weight_TK = softmax_over(logits_TN.gather(-1, index_TK), kept_TK)
        else:
            weight_TK = at(scores_TN, index_TK, kept_TK)
        if config.normalize_top_k:
            weight_TK = normalize(
                weight_TK,
                order=config.normalization_order,
                floor=config.normalization_floor,
                epsilon=config.normalization_epsilon,
            )
        if config.scaling_factor != 1.0:
            weight_TK = weight_TK * config.scaling_factor
        if self.per_expert_scale is not None:
            weight_TK = weight_TK * self.per_expert_scale.to(weight_TK.dtype)[index_TK]
        return weight_TK

    def _select(self, compared_TN: Tensor) -> tuple[Tensor, Tensor]:
        """The picks, and what was compared to find them: biased, and masked outside the token's groups."""
        config = self.config
        selection_TN = compared_TN.detach()
        if self.e_score_correction_bias is not None:
            selection_TN = selection_TN + self.e_score_correction_bias
        if config.num_groups is not None and config.top_k_groups is not None:
            mask_value = float("-inf") if config.group_mask_value == "-inf" else 0.0
            selection_TN = limit_to_groups(
                selection_TN, config.num_groups, config.top_k_groups, config.group_score, mask_value
            )
        return top_k(selection_TN, config.top_k, stable=config.stable_ties), selection_TN

    def _logits(self, x_TD: Tensor, context: RoutingContext | None) -> Tensor:
        config, precision = self.config, self.precision(x_TD)
        input_TD = x_TD.to(precision)
        if self.training and config.input_jitter:
            noise_TD = uniform(context, self.layer, input_TD.shape, stream=0, like=input_TD)
            input_TD = input_TD * (1 + config.input_jitter * (2 * noise_TD - 1))
        if config.input_norm:
            input_TD = F.rms_norm(input_TD, input_TD.shape[-1:], eps=config.input_norm_epsilon)
        if self.scale is not None:
            input_TD = input_TD * self.scale.to(precision)
        logits_TN = linear(input_TD, self.weight, self.bias)
        if config.logit_scale != 1.0:
            logits_TN = logits_TN * config.logit_scale
        if config.logit_softcap is not None:
            logits_TN = config.logit_softcap * torch.tanh(logits_TN / config.logit_softcap)
        return logits_TN

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, score_function={self.config.score_function}"
