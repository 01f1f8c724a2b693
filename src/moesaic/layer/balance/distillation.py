"""The distillation loss of routers that teach a second, lighter one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer.balance.base import BalanceLoss
from moesaic.layer.record import Routing, RoutingContext

if TYPE_CHECKING:
    from moesaic.layer.spec import MoESpec


class Distillation(BalanceLoss):
    """mean_t of the record's auxiliary loss `distillation` (StableMoE, arXiv 2204.08396, section 3.1).

    For the router `stable`: the cross entropy of its light router against the expert that was picked.
    """

    type: Literal["distillation"] = "distillation"

    def check(self, spec: MoESpec) -> None:
        super().check(spec)
        if self.type not in spec.router.provides:
            raise ConfigError("type", self.type, "needs a router that distils, such as stable", "remove it")

    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        loss_T = routing.auxiliary[self.type]
        if context.mask_T is not None:
            loss_T = loss_T.masked_fill(~context.mask_T, 0.0)
        tokens_B = context.tokens_per_sequence(loss_T.shape[0], dtype=loss_T.dtype, device=loss_T.device)
        return loss_T.view(context.batch_size, -1).sum(-1) / tokens_B.clamp(min=1)
