"""Mixture of tokens: experts process mixes of tokens that stand at the same position of different sequences."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from moesaic.layer.assignment import Slots, SlotsAcross, group_across, ungroup_across
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Dependence, Router
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.parts.sequences import real_tokens, sequences


class MixtureOfTokensConfig(BaseRouterConfig):
    """Fields of mixing tokens across sequences (Antoniak et al., arXiv 2310.15961, section 3).

    An expert gets one mix of each group's tokens, weighed by a softmax over the group, and each token gets the expert's
    output with the weight that it had in the mix.

    Attributes:
        group_size: sequences of a group, neighbours in the micro-batch; None for all of them.
    """

    type: Literal["mixture_of_tokens"] = "mixture_of_tokens"
    group_size: PositiveInt | None = None

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        return frozenset({"other_sequences"})

    @property
    def runs_all_experts(self) -> bool:
        return True

    @property
    def takes_picks(self) -> bool:
        return False

    def check(self, num_experts: int) -> None:
        """Any number of experts will do."""

    def build(self, hidden_size: int, num_experts: int) -> MixtureOfTokensRouter:
        self.check(num_experts)
        return MixtureOfTokensRouter(self, hidden_size, num_experts)


class MixtureOfTokensRouter(Router[MixtureOfTokensConfig]):
    """One mix for each expert and group. In the record every token picks all experts, with its share of their mixes.

    Parameters: `weight` (N, D).
    """

    def __init__(self, config: MixtureOfTokensConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        tokens = x_TD.shape[0]
        batch, _ = sequences(tokens, context)
        size = self.config.group_size or batch
        logits_TN = linear(x_TD, self.weight)
        real_GM1 = group_across(real_tokens(x_TD, context).reshape(-1, 1), batch, size)
        logits_GMN = group_across(logits_TN, batch, size)
        # The lowest number, not -inf: a group of padding only would give NaN.
        lowest = torch.finfo(logits_GMN.dtype).min
        share_GMN = logits_GMN.masked_fill(~real_GM1, lowest).softmax(1) * real_GM1
        share_TN = ungroup_across(share_GMN, batch, tokens)
        index_N = torch.arange(self.num_experts, device=x_TD.device)
        return Routing(
            index_TK=index_N.repeat(tokens, 1),
            weight_TK=share_TN,
            logits_TN=logits_TN,
            scores_TN=share_TN,
            selection_TN=share_TN.detach(),
            assignment=SlotsAcross(Slots(share_GMN, share_GMN, self.num_experts), batch, size),
        )

    @property
    def picks(self) -> float:
        return self.num_experts / (self.config.group_size or self.num_experts)
