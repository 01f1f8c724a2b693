"""Merged top-k: each sequence picks K experts and passes one, their weighted sum (MEO)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import Dependence, Router, check_top_k
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.parts.merging import MergingConfig, merged_routing
from moesaic.layer.routers.parts.sequences import mean_of_tokens, real_tokens, sequences
from moesaic.layer.routers.scores import ScoreFunction, score, top_k


class MergedTopKConfig(MergingConfig):
    """Fields of merging the selected experts (MEO, He et al., arXiv 2310.09832, section 3).

    Attributes:
        top_k: experts that are merged for a sequence (K).
        score_function: how the logits of the mean token become weights.
        normalize_top_k: divide the K weights by their sum; with softmax scores that is the softmax over the selected
            logits, as in the released code. With K = 1 the weight is then 1 and teaches the router nothing.
        token_bottleneck: width of a network x + W_up relu(W_down x) through which tokens pass before they are averaged
            and before they reach the merged expert, so that tokens differ by more than one linear map (token attention,
            section 3; D / 64 in the released code). None for no such network.
        linear_bias: give the logits' linear map a learned bias.
    """

    type: Literal["merged_top_k"] = "merged_top_k"
    top_k: PositiveInt
    score_function: ScoreFunction = "softmax"
    normalize_top_k: bool = True
    token_bottleneck: PositiveInt | None = None
    linear_bias: bool = False

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        return frozenset({"later_tokens"})

    def check(self, num_experts: int) -> None:
        check_top_k(self.top_k, num_experts)

    def build(self, hidden_size: int, num_experts: int) -> MergedTopKRouter:
        self.check(num_experts)
        return MergedTopKRouter(self, hidden_size, num_experts)


class MergedTopKRouter(Router[MergedTopKConfig]):
    """K experts for each sequence, merged to one: weights and biases are summed, so that there is one activation.

    Parameters are `weight` (N, D) and, with `linear_bias`, `bias` (N,); with `token_bottleneck`, R, also `down_weight`
    (R, D), `down_bias` (R,), `up_weight` (D, R) and `up_bias` (D,), the latter two 0 at first.
    """

    down_weight: nn.Parameter | None
    down_bias: nn.Parameter | None
    up_weight: nn.Parameter | None
    up_bias: nn.Parameter | None

    def __init__(self, config: MergedTopKConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, config.top_k)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.linear_bias else None
        width = config.token_bottleneck
        sizes = {"down_weight": (width, hidden_size), "down_bias": (width,), "up_weight": (hidden_size, width)}
        for name, size in {**sizes, "up_bias": (hidden_size,)}.items():
            self.register_parameter(name, None if width is None else nn.Parameter(torch.empty(size)))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        super().reset_parameters(std)
        if self.up_weight is not None:
            nn.init.zeros_(self.up_weight)

    def _added(self, x_TD: Tensor) -> Tensor | None:
        """What the bottleneck adds to each token."""
        if self.down_weight is None or self.up_weight is None:
            return None
        return linear(linear(x_TD, self.down_weight, self.down_bias).relu(), self.up_weight, self.up_bias)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        config, (batch, length) = self.config, sequences(x_TD.shape[0], context)
        mask_BL = real_tokens(x_TD, context)
        added_TD = self._added(x_TD)
        seen_TD = x_TD.to(self.precision(x_TD)) if added_TD is None else x_TD + added_TD
        x_BLD = seen_TD.view(batch, length, x_TD.shape[-1])
        logits_BSN = linear(mean_of_tokens(x_BLD, mask_BL), self.weight, self.bias).unsqueeze(1)
        scores_BSN = score(logits_BSN, config.score_function)
        index_BSK = top_k(scores_BSN.detach(), config.top_k, stable=True)
        weight_BSK = scores_BSN.gather(-1, index_BSK)
        if config.normalize_top_k:
            weight_BSK = weight_BSK / weight_BSK.sum(-1, keepdim=True)
        weight_BSN = torch.zeros_like(scores_BSN).scatter(-1, index_BSK, weight_BSK)
        return merged_routing(logits_BSN, scores_BSN, weight_BSN, mask_BL.unsqueeze(-1), index_BSK, added_TD)

    @property
    def picks(self) -> float:
        return 1.0
