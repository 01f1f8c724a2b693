"""Losses that belong to a router's own mechanism, which it leaves in its record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer.balance.base import BalanceLoss
from moesaic.layer.balance.sums import mean_over
from moesaic.layer.record import Routing, RoutingContext

if TYPE_CHECKING:
    from moesaic.layer.spec import MoESpec


class RouterLoss(BalanceLoss):
    """Mean over tokens of a value that the router gives for each; the router's page says what it is.

    Attributes:
        loss: its name among the router's own losses.
    """

    type: Literal["router"] = "router"
    loss: str

    @property
    def name(self) -> str:
        """Key under which the loss is reported."""
        return self.label or self.loss

    def check(self, spec: MoESpec) -> None:
        super().check(spec)
        known = sorted(spec.router.provides)
        if self.loss not in known:
            remedy = f"choose from {', '.join(known)}" if known else "remove this entry"
            raise ConfigError("loss", self.loss, f"is no loss of router {spec.router.type}", remedy)

    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        return mean_over(routing.auxiliary[self.loss].unsqueeze(-1), context, "sequence").squeeze(-1)
