"""The router z-loss, which keeps logits small."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moesaic.layer.balance.base import BalanceLoss
from moesaic.layer.record import Routing, RoutingContext


class ZLoss(BalanceLoss):
    """mean_t (log sum_i exp logit_ti)^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""

    type: Literal["z_loss"] = "z_loss"

    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        z_T = routing.logits_TN.logsumexp(-1).square()
        if context.mask_T is not None:
            # Not a product: what a padded position holds may be infinite.
            z_T = z_T.masked_fill(~context.mask_T, 0.0)
        tokens_B = context.tokens_per_sequence(z_T.shape[0], dtype=z_T.dtype, device=z_T.device)
        return z_T.view(context.batch_size, -1).sum(-1) / tokens_B.clamp(min=1)
