"""Another number of experts for each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import PositiveInt

from moesaic.layer.overrides.base import KeysOn, OverridePart, Phase, Picking, check_at_most
from moesaic.layer.routers.base import Router


class TopK(OverridePart):
    """The k best experts, by what the router's own selection compares; "ensemble routing" of SCMoE (arXiv 2405.14507).

    Weights follow the router's rule over the k picks. With the router's own number of picks nothing changes, bit for bit.
    Where the router has null experts, they are ranked among the others.

    Attributes:
        k: picks for each token.
    """

    phase: ClassVar = Phase.CHOOSE
    ranks: ClassVar = True

    type: Literal["k"] = "k"
    k: PositiveInt

    def check(self, layer: int, router: Router) -> None:
        super().check(layer, router)
        check_at_most("k", self.k, router.most_admitted, layer, "experts that a token may have")

    def picks(self, layer: int, num_experts: int, keys: KeysOn) -> Sequence[int]:
        return range(1, self.k + 1)

    def apply(self, picking: Picking) -> Picking:
        router, routing = picking.router, picking.routing
        own = not (picking.excluded or routing.overridden or routing.ragged or router.config.may_skip)
        if own and self.k == router.top_k == routing.top_k:
            return picking
        picking.require(self.k, f"k = {self.k}")
        return picking.chosen(picking.ranked(self.k))
