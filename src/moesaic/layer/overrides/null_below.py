"""Picks of little weight become null."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from moesaic.layer.overrides.base import OverridePart, Phase, Picking


class NullBelow(OverridePart):
    """Picks whose share of the token's weight is below a threshold become no expert, which costs nothing.

    The share is a pick's weight over the sum of the weights of the token's experts. The pick with the largest stays, so
    that no token is left without one it had.

    Attributes:
        null: the threshold, above 0 and at most 1.
        weights: of the picks that stay: "router" weighs them anew by the router's rule, which renormalises where it
            normalises; "kept" leaves them as they were.
    """

    phase: ClassVar = Phase.DROP

    type: Literal["null"] = "null"
    null: float = Field(gt=0, le=1)
    weights: Literal["router", "kept"] = "router"

    def apply(self, picking: Picking) -> Picking:
        weight_TK = picking.weights()
        expert_TK = picking.choice_TK < picking.routing.num_experts
        share_TK = weight_TK.detach().masked_fill(~expert_TK, 0.0)
        least_T1 = share_TK.sum(-1, keepdim=True) * self.null
        best_TK = share_TK == share_TK.amax(-1, keepdim=True)
        best_TK = best_TK & (best_TK.cumsum(-1) == 1)
        dropped_TK = expert_TK & (share_TK < least_T1) & ~best_TK
        choice_TK = picking.choice_TK.masked_fill(dropped_TK, picking.routing.num_columns)
        if self.weights == "kept":
            return replace(picking, choice_TK=choice_TK, weight_TK=weight_TK.masked_fill(dropped_TK, 0.0))
        new_TK = picking.chosen(choice_TK).weights()
        # Tokens that lose no pick keep their weights bit for bit.
        weight_TK = new_TK.where(dropped_TK.any(-1, keepdim=True), weight_TK)
        return replace(picking, choice_TK=choice_TK, weight_TK=weight_TK)
