"""As many experts as a token needs to be sure: dynamic routing."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt

from moesaic.layer.overrides.base import OverridePart, Phase, Picking


class DynamicExperts(OverridePart):
    """The smallest number of best experts whose scores sum to more than a threshold (Huang et al., arXiv 2403.07652; the
    baseline "dynamic routing" of SCMoE, arXiv 2405.14507).

    Scores are shares: those of the router's score function, over all that the token may pick, divided by their sum. So
    the threshold means the same for sigmoids and inside groups. Weights follow the router's rule at the picks. Tokens have
    different numbers of picks.

    Attributes:
        dynamic: the threshold, above 0 and below 1.
        most: no token has more picks than this; None for no bound.
    """

    phase: ClassVar = Phase.CHOOSE
    ranks: ClassVar = True

    type: Literal["dynamic"] = "dynamic"
    dynamic: float = Field(gt=0, lt=1)
    most: PositiveInt | None = None

    def apply(self, picking: Picking) -> Picking:
        columns = picking.routing.num_columns
        order_TM = picking.ranked(columns)
        admitted_TM = picking.order_TM.gather(-1, order_TM) > float("-inf")
        share_TM = picking.routing.scores_TN.detach().gather(-1, order_TM).masked_fill(~admitted_TM, 0.0)
        share_TM = share_TM / share_TM.sum(-1, keepdim=True).clamp(min=torch.finfo(share_TM.dtype).tiny)
        before_TM = share_TM.cumsum(-1) - share_TM
        kept_TM = admitted_TM & (before_TM <= self.dynamic)
        # The best is always kept; rounding must not leave a hole after it.
        kept_TM = kept_TM.cummin(-1).values
        if self.most is not None:
            kept_TM = kept_TM & (torch.arange(columns, device=kept_TM.device) < self.most)
        # Padding of the width is computed where experts can't skip.
        width = max(int(kept_TM.sum(-1).max()), 1) if kept_TM.shape[0] else 1
        return picking.chosen(order_TM.masked_fill(~kept_TM, columns)[:, :width].contiguous())
