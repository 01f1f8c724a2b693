"""Merged experts: each sequence passes one expert, the average of all with its own weights (SMEAR)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from moesaic.layer.noise import uniform
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import Dependence, Router
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.parts.merging import MergingConfig, merged_routing
from moesaic.layer.routers.parts.sequences import mean_of_tokens, real_tokens, sequences


class MergedConfig(MergingConfig):
    """Fields of soft merging of experts (SMEAR, Muqeeth, Liu and Raffel, arXiv 2306.03745, section 3).

    A sequence's weights are the softmax of a linear map of the mean of its tokens.

    Attributes:
        expert_dropout: in training, leave each expert out of a sequence's average with this probability, and divide the
            other weights by their sum; where all would be left out, none is.
        normalize_input: give the mean token mean 0 and variance 1 first (released code).
        normalize_weight: the same for each expert's row of the linear map.
    """

    type: Literal["merged"] = "merged"
    expert_dropout: float = Field(default=0.1, ge=0, lt=1)
    normalize_input: bool = True
    normalize_weight: bool = True

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        draws = training and self.expert_dropout > 0
        return frozenset({"later_tokens", "random_numbers"} if draws else {"later_tokens"})

    @property
    def runs_all_experts(self) -> bool:
        return True

    def check(self, num_experts: int) -> None:
        """Any number of experts will do."""

    def build(self, hidden_size: int, num_experts: int) -> MergedRouter:
        self.check(num_experts)
        return MergedRouter(self, hidden_size, num_experts)


class MergedRouter(Router[MergedConfig]):
    """One merged expert for each sequence. In the record all its tokens pick all experts, with the sequence's weights.

    Parameters: `weight` (N, D).
    """

    def __init__(self, config: MergedConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        config, (batch, length) = self.config, sequences(x_TD.shape[0], context)
        mask_BL = real_tokens(x_TD, context)
        width = x_TD.shape[-1:]
        mean_BD = mean_of_tokens(x_TD.to(self.precision(x_TD)).view(batch, length, *width), mask_BL)
        weight_ND = self.weight.to(mean_BD.dtype)
        if config.normalize_input:
            mean_BD = F.layer_norm(mean_BD, width)
        if config.normalize_weight:
            weight_ND = F.layer_norm(weight_ND, width)
        logits_BSN = linear(mean_BD, weight_ND).unsqueeze(1)
        scores_BSN = logits_BSN.softmax(-1)
        weight_BSN = scores_BSN
        if self.training and config.expert_dropout:
            drawn_BSN = uniform(context, self.layer, scores_BSN.shape, stream=0, like=scores_BSN)
            kept_BSN = drawn_BSN >= config.expert_dropout
            kept_BSN = kept_BSN | ~kept_BSN.any(-1, keepdim=True)
            # From logits rather than scores: those of all experts that are kept may be 0 beside one that is not.
            weight_BSN = logits_BSN.masked_fill(~kept_BSN, float("-inf")).softmax(-1)
        return merged_routing(logits_BSN, scores_BSN, weight_BSN, mask_BL.unsqueeze(-1))

    @property
    def picks(self) -> float:
        return 1.0
