"""The load loss: experts shall have equal expected numbers of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer.balance.base import BalanceLoss
from moesaic.layer.balance.sums import Scope, squared_variation, sum_over
from moesaic.layer.record import Routing, RoutingContext

if TYPE_CHECKING:
    from moesaic.layer.spec import MoESpec


class SmoothLoad(BalanceLoss):
    """Squared coefficient of variation of the experts' load: over tokens, the sum of their probability to be selected.

    The probability is that of noisy top-k when an expert's own noise is drawn again, and differentiable. Source:
    Shazeer et al. (arXiv 1701.06538, eq. 8-11), with a coefficient of 0.1; V-MoE (arXiv 2106.05974, appendix A), with
    0.005 in its code. 0 when balanced, at most N - 1.

    Attributes:
        scope: tokens over which load is summed; only "sequence" is independent of accumulation and world size. The
            sources sum over a batch.
    """

    type: Literal["load"] = "load"
    scope: Scope = "sequence"

    def check(self, spec: MoESpec) -> None:
        super().check(spec)
        if not spec.router.has_smooth_load:
            raise _no_probability(self.type)

    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        if routing.load_TN is None:
            raise _no_probability(self.type)
        return squared_variation(sum_over(routing.load_TN, context, self.scope))


def _no_probability(name: str) -> ConfigError:
    return ConfigError(
        "type",
        name,
        "needs a router that knows the probability of each pick",
        "use router noisy_top_k, or load_balancing in its place",
    )
