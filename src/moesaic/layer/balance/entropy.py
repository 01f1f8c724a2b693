"""Entropy losses of LIMoE: definite choices for each token, many experts for all tokens, also by modality."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, NonNegativeInt
from torch import Tensor

from moesaic.layer.balance.base import BalanceLoss
from moesaic.layer.balance.labels import Label, label_of_tokens
from moesaic.layer.balance.sums import Scope, entropy, probabilities, sum_over
from moesaic.layer.record import Routing, RoutingContext


class _OfModality(BalanceLoss):
    """A loss on all tokens, or on those of one modality."""

    modality: NonNegativeInt | None = None
    scope: Scope = "sequence"

    @property
    def needs(self) -> frozenset[Label]:
        return frozenset() if self.modality is None else frozenset({"modality"})

    def mean(self, values_TX: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor]:
        """Mean over the tokens, (B, X), and whether there are any, (B,)."""
        member_T1 = values_TX.new_ones(values_TX.shape[0], 1)
        if self.modality is not None:
            label_T = label_of_tokens(context, "modality", values_TX.shape[0], self.name)
            member_T1 = (label_T == self.modality).to(values_TX.dtype).unsqueeze(-1)
        tokens_B1 = sum_over(member_T1, context, self.scope)
        mean_BX = sum_over(values_TX * member_T1, context, self.scope) / tokens_B1.clamp(min=1)
        return mean_BX, tokens_B1.squeeze(-1) > 0


class LocalEntropy(_OfModality):
    """mean_t H(p_t), the entropy of a token's normalised scores: 0 where every choice is definite, at most log N.

    Source: the local loss of LIMoE (arXiv 2206.02770).

    Attributes:
        modality: only tokens of this modality, by its number; None for all.
        scope: tokens over which the mean is taken. With "sequence", each sequence's mean counts as much as its tokens in
            the cross entropy do.
    """

    type: Literal["local_entropy"] = "local_entropy"

    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        return self.mean(entropy(probabilities(routing)).unsqueeze(-1), context)[0].squeeze(-1)


class GlobalEntropy(_OfModality):
    """max(0, log S - H(mean_t p_t)): the tokens together shall use at least S experts.

    Source: the global loss of LIMoE (arXiv 2206.02770) with the threshold log S. Without S it is -H, from -log N
    where all experts have equal shares to 0 for one expert.

    Attributes:
        min_experts: S, the number of experts in equal use that is enough; no longer is there a gradient then.
        modality: only tokens of this modality, by its number; None for all.
        scope: tokens over which the mean is taken; only "sequence" is independent of accumulation and world size. LIMoE
            takes it over a batch.
    """

    type: Literal["global_entropy"] = "global_entropy"
    min_experts: float | None = Field(default=None, ge=1)

    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        mean_BM, any_B = self.mean(probabilities(routing), context)
        loss_B = -entropy(mean_BM)
        if self.min_experts is not None:
            loss_B = (loss_B + math.log(self.min_experts)).clamp(min=0)
        return loss_B * any_B
