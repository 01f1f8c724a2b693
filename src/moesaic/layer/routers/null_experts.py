"""Token-choice top-k over experts and null experts: a token that picks nulls runs fewer experts (AdaMoE)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Router, check_top_k
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.scores import at, softmax_over, top_k


class NullExpertsConfig(BaseRouterConfig):
    """Fields of routing with null experts.

    The defaults are AdaMoE's (arXiv 2406.13233, section 3): softmax over experts and nulls, K picks among both, weights
    normalised over the picks that are experts. Null experts give zero and cost nothing. LongCat-Flash's zero-computation
    experts (arXiv 2509.01322, section 2.1) are `null_output: identity` with `normalize_over: none`, `selection_bias` and
    `scaling_factor: 6.0`.

    Attributes:
        top_k: picks for each token (K), nulls included; it may exceed the number of experts.
        num_null: null experts (m), the columns after the N experts'. 0 is plain top-k.
        normalize_over: the weights of a token sum to 1 over its picked "experts" (section 3.4, option 2) or over all its
            "selected" columns, nulls included (option 1); "none" leaves the softmax scores as they are.
        null_output: a null gives "zero", or the token itself ("identity", an extension that AdaMoE names as future work).
        tie_margin: a null goes before an expert only if its score is larger by more than this share. Copies of an
            expert's row tie with it exactly only on paper: a matrix product rounds some columns otherwise.
        scaling_factor: multiplies the weights last.
        selection_bias: add a bias for each column, which no gradient reaches, to the scores for selection only.
        linear_bias: give the logits' linear map a learned bias.
    """

    type: Literal["null_experts"] = "null_experts"
    top_k: PositiveInt
    num_null: NonNegativeInt
    normalize_over: Literal["experts", "selected", "none"] = "experts"
    null_output: Literal["zero", "identity"] = "zero"
    tie_margin: float = Field(default=0.0, ge=0, lt=1)
    scaling_factor: float = 1.0
    selection_bias: bool = False
    linear_bias: bool = False

    @model_validator(mode="after")
    def _identity_has_a_weight(self) -> NullExpertsConfig:
        if self.null_output == "identity" and self.normalize_over == "experts":
            raise ConfigError(
                "null_output",
                "identity",
                "needs weights for the nulls, which normalize_over: experts does not give",
                "set normalize_over to selected or none",
            )
        return self

    @property
    def may_skip(self) -> bool:
        return self.num_null > 0

    def check(self, num_experts: int) -> None:
        check_top_k(self.top_k, num_experts + self.num_null, "num_experts + num_null")

    def build(self, hidden_size: int, num_experts: int) -> NullExpertsRouter:
        self.check(num_experts)
        return NullExpertsRouter(self, hidden_size, num_experts)


class NullExpertsRouter(Router[NullExpertsConfig]):
    """One linear map for N experts and m nulls; the K best of its M = N + m columns, ties to the lower index.

    So at a tie an expert goes before a null. Parameters: `weight` (M, D), `bias` (M,), and the buffer
    `e_score_correction_bias` (M,), which stays float32 when the module is cast.
    """

    e_score_correction_bias: Tensor | None
    full_precision = ("e_score_correction_bias",)

    def __init__(self, config: NullExpertsConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, config.top_k)
        columns = num_experts + config.num_null
        self.weight = nn.Parameter(torch.empty(columns, hidden_size))
        self.bias = nn.Parameter(torch.empty(columns)) if config.linear_bias else None
        correction = torch.zeros(columns, dtype=torch.float32) if config.selection_bias else None
        self.register_buffer("e_score_correction_bias", correction)
        self.reset_parameters()

    @property
    def picks(self) -> float:
        """K N / (N + m)."""
        return self.top_k * self.num_experts / (self.num_experts + self.config.num_null)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        config = self.config
        logits_TM = linear(x_TD, self.weight, self.bias)
        scores_TM = logits_TM.softmax(-1)
        selection_TM = scores_TM.detach()
        if config.tie_margin:
            experts_TN, nulls_TM = selection_TM.split([self.num_experts, config.num_null], dim=-1)
            selection_TM = torch.cat([experts_TN, nulls_TM * (1 - config.tie_margin)], dim=-1)
        if self.e_score_correction_bias is not None:
            selection_TM = selection_TM + self.e_score_correction_bias
        chosen_TK = top_k(selection_TM, config.top_k, stable=True)
        null_TK = chosen_TK >= self.num_experts
        weight_TK = self._weights(logits_TM, scores_TM, chosen_TK)
        identity_T = None
        if config.null_output == "identity":
            identity_T = weight_TK.masked_fill(~null_TK, 0.0).sum(-1)
        return Routing(
            index_TK=chosen_TK.masked_fill(null_TK, self.num_experts),
            weight_TK=weight_TK.masked_fill(null_TK, 0.0),
            logits_TN=logits_TM,
            scores_TN=scores_TM,
            selection_TN=selection_TM,
            num_null=config.num_null,
            chosen_TK=chosen_TK,
            identity_weight_T=identity_T,
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        return self._weights(routing.logits_TN, routing.scores_TN, index_TK, kept_TK)

    def _weights(
        self, logits_TM: Tensor, scores_TM: Tensor, chosen_TK: Tensor, kept_TK: Tensor | None = None
    ) -> Tensor:
        match self.config.normalize_over:
            case "experts":
                expert_TK = chosen_TK < self.num_experts
                if kept_TK is not None:
                    expert_TK = expert_TK & kept_TK
                weight_TK = softmax_over(logits_TM.gather(-1, chosen_TK), expert_TK)
            case "selected":
                weight_TK = softmax_over(logits_TM.gather(-1, chosen_TK), kept_TK)
            case "none":
                weight_TK = at(scores_TM, chosen_TK, kept_TK)
        if self.config.scaling_factor != 1.0:
            weight_TK = weight_TK * self.config.scaling_factor
        return weight_TK

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_null={self.config.num_null}"
