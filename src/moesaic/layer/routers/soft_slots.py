"""Soft slots: experts process mixes of a sequence's tokens, and tokens get mixes of their outputs (Soft MoE)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from moesaic.layer.assignment import Slots
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Dependence, Router
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.parts.sequences import real_tokens


class SoftSlotsConfig(BaseRouterConfig):
    """Fields of soft slots.

    The defaults are those of Puigcerver et al. (arXiv 2308.00951): logits of tokens by slots, a softmax over tokens to
    fill the slots (eq. 1) and one over slots to mix their outputs (eq. 3), with normalised logits (section 2.3).

    Attributes:
        slots_per_expert: slots of each sequence that an expert processes.
        normalize: logits are `scale` times the cosine of token and slot, with a learned scale of 1 at first, instead of
            their inner product; the softmaxes of that become one-hot as the hidden size grows.
        normalization_epsilon: added to the squared norms (1e-6 in the released code).
    """

    type: Literal["soft_slots"] = "soft_slots"
    slots_per_expert: PositiveInt = 1
    normalize: bool = True
    normalization_epsilon: float = 1e-6

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        return frozenset({"later_tokens"})

    @property
    def runs_all_experts(self) -> bool:
        return True

    @property
    def takes_picks(self) -> bool:
        return False

    def check(self, num_experts: int) -> None:
        """Any number of experts will do."""

    def build(self, hidden_size: int, num_experts: int) -> SoftSlotsRouter:
        self.check(num_experts)
        return SoftSlotsRouter(self, hidden_size, num_experts)


class SoftSlotsRouter(Router[SoftSlotsConfig]):
    """Each expert gets `slots_per_expert` mixes of each sequence's tokens; padding is no part of them.

    In the record every token picks all experts, with the share of their slots in its output; the logit of an expert is
    the log-sum-exp of its slots', so that its softmax is that share. Parameters: `weight` (N * slots_per_expert, D), a
    row for each slot, those of expert 0 first; with `normalize` also `scale` (1,).
    """

    def __init__(self, config: SoftSlotsConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts * config.slots_per_expert, hidden_size))
        self.scale = nn.Parameter(torch.empty(1)) if config.normalize else None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, std=std)
        if self.scale is not None:
            nn.init.ones_(self.scale)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        mask_BL1 = real_tokens(x_TD, context).unsqueeze(-1)
        logits_TP = self._logits(x_TD)
        logits_BLP = logits_TP.view(*mask_BL1.shape[:2], logits_TP.shape[-1])
        # The lowest number, not -inf: a sequence of padding only would give NaN.
        lowest = torch.finfo(logits_BLP.dtype).min
        dispatch_BLP = logits_BLP.masked_fill(~mask_BL1, lowest).softmax(1) * mask_BL1
        logits_TN = logits_TP.unflatten(-1, (self.num_experts, -1)).logsumexp(-1)
        scores_TN = logits_TN.softmax(-1)
        index_N = torch.arange(self.num_experts, device=x_TD.device)
        return Routing(
            index_TK=index_N.repeat(x_TD.shape[0], 1),
            weight_TK=scores_TN,
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=scores_TN.detach(),
            assignment=Slots(dispatch_BLP, logits_BLP.softmax(-1), self.num_experts),
        )

    def _logits(self, x_TD: Tensor) -> Tensor:
        precision = self.precision(x_TD)
        x_TD, weight_PD = x_TD.to(precision), self.weight.to(precision)
        if self.scale is not None:
            x_TD, weight_PD = self._unit(x_TD), self._unit(weight_PD) * self.scale.to(precision)
        return linear(x_TD, weight_PD)

    def _unit(self, rows: Tensor) -> Tensor:
        return rows * (rows.square().sum(-1, keepdim=True) + self.config.normalization_epsilon).rsqrt()

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, slots_per_expert={self.config.slots_per_expert}"
