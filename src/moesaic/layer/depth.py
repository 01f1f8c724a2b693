"""Mixture of depths: only some tokens of a sequence pass the layer; for the others the residual stands alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from moesaic.configuration import Config
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import Dependence
from moesaic.layer.routers.parts.sequences import real_tokens, take


class DepthConfig(Config):
    """Which tokens pass the layer (Raposo et al., arXiv 2404.02258, section 3).

    A token has the scalar r = w . x. In training the C tokens of a sequence with the largest r pass.

    Attributes:
        capacity: C as a share of the sequence's tokens, rounded up; 0.125 is the best of the paper (section 4.1).
        scale: the output of a token that passes is multiplied by r itself ("logit", eq. 1) or by its "sigmoid".
        decoding: "refuse" chooses in evaluation as in training, which no decoder can do. With "threshold" a token passes
            in evaluation if the sigmoid of its r is above 0.5, which the balance loss `depth` teaches (section 3.5).
    """

    capacity: float = Field(default=0.125, gt=0, le=1)
    scale: Literal["logit", "sigmoid"] = "logit"
    decoding: Literal["refuse", "threshold"] = "refuse"

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        """What decides whether a token passes, besides the token itself and earlier ones of its sequence."""
        return frozenset() if self.decoding == "threshold" and not training else frozenset({"later_tokens"})

    @property
    def unservable(self) -> str | None:
        """Why it can't decode token by token with a cache, or None if it can."""
        if not self.depends_on(training=False):
            return None
        return "whether a token passes depends on later tokens; models trained with decoding: threshold can decode"

    def choose(self, logits_T: Tensor, context: RoutingContext | None, *, training: bool) -> Passing:
        """Decide for T tokens with their logits r, in float32 or float64."""
        mask_BL = real_tokens(logits_T, context)
        choice_T = logits_T.detach()
        if self.decoding == "threshold" and not training:
            passes_T = (choice_T > 0) & mask_BL.flatten()
        else:
            # In float64, and a little less: products that are whole numbers must not be rounded up.
            capacity_B = (mask_BL.sum(1).to(torch.float64) * self.capacity - 1e-9).ceil().long()
            passes_T = take(choice_T.view(*mask_BL.shape, 1), mask_BL, capacity_B).flatten()
        return Passing(
            passes_T=passes_T,
            scale_T=logits_T if self.scale == "logit" else logits_T.sigmoid(),
            loss_T=F.binary_cross_entropy_with_logits(logits_T, passes_T.to(logits_T.dtype), reduction="none"),
        )


@dataclass(frozen=True)
class Passing:
    """Which tokens pass a layer.

    Attributes:
        passes_T: True for those that do; never for padding.
        scale_T: what multiplies their output.
        loss_T: binary cross entropy of the logits against what passes.
    """

    passes_T: Tensor
    scale_T: Tensor
    loss_T: Tensor

    def inside(self, context: RoutingContext | None) -> RoutingContext:
        """The context as those that pass see it: the others are padding there."""
        return replace(context or RoutingContext(), mask_T=self.passes_T)

    def record(self, routing: Routing, context: RoutingContext | None) -> Routing:
        """The record in which tokens that don't pass have no picks."""
        passes_T1 = self.passes_T.unsqueeze(-1)
        real_T = real_tokens(self.passes_T, context).flatten()
        dropped_TK, identity_T = routing.dropped_TK, routing.identity_weight_T
        return replace(
            routing,
            index_TK=torch.where(passes_T1, routing.index_TK, routing.num_experts),
            weight_TK=torch.where(passes_T1, routing.weight_TK, 0.0),
            chosen_TK=torch.where(passes_T1, routing.choice_TK, routing.num_columns),
            dropped_TK=None if dropped_TK is None else dropped_TK & passes_T1,
            identity_weight_T=None if identity_T is None else torch.where(self.passes_T, identity_T, 0.0),
            skipped_T=real_T & ~self.passes_T,
            auxiliary=routing.auxiliary | {"depth": self.loss_T},
        )

    def scaled(self, y_TD: Tensor) -> Tensor:
        """Outputs times their scale; 0 for tokens that don't pass."""
        return torch.where(self.passes_T.unsqueeze(-1), y_TD * self.scale_T.unsqueeze(-1).to(y_TD.dtype), 0.0)
