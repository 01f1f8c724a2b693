"""The loss that teaches a layer's depth logits where 0 is: at the tokens that just pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer.balance.base import BalanceLoss
from moesaic.layer.balance.sums import mean_over
from moesaic.layer.record import Routing, RoutingContext

if TYPE_CHECKING:
    from moesaic.layer.spec import MoESpec


class DepthLoss(BalanceLoss):
    """Mean over tokens of the binary cross entropy between a token's depth logit and whether it passed the layer.

    With it, sigmoid(r) > 0.5 is about the choice of the C largest r, and looks at one token only (mixture of depths,
    arXiv 2404.02258, section 3.5).
    """

    type: Literal["depth"] = "depth"
    counts_skipped: ClassVar[bool] = True

    def check(self, spec: MoESpec) -> None:
        super().check(spec)
        if spec.depth is None or spec.depth.decoding != "threshold":
            raise ConfigError("type", self.type, "teaches what only depth.decoding: threshold uses", "remove it")

    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        return mean_over(routing.auxiliary[self.type].unsqueeze(-1), context, "sequence").squeeze(-1)
