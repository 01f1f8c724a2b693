"""Ablation: the model without some of its experts."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor

from moesaic.layer.overrides.base import OverridePart, Phase, Picking, check_at_most, check_distinct, check_experts
from moesaic.layer.routers.base import Router


class WithoutExperts(OverridePart):
    """No token picks these experts; where one would, the best that it has not picked takes the place, if one is left.

    Ranks and draws of other parts go over the experts that are left. Groups are those that the router chose with all of its
    experts. Tokens that would have picked none of these keep picks and weights bit for bit; for others the weights of all
    picks follow the router's rule anew.

    Attributes:
        without: numbers of the experts, from 0.
    """

    phase: ClassVar = Phase.ADMIT
    ranks: ClassVar = True

    type: Literal["without"] = "without"
    without: tuple[NonNegativeInt, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> WithoutExperts:
        check_distinct("without", self.without)
        return self

    def check(self, layer: int, router: Router) -> None:
        super().check(layer, router)
        check_experts("without", self.without, router, layer)
        check_at_most("experts in without", len(self.without), router.num_experts - 1, layer, "that leave one")

    def apply(self, picking: Picking) -> Picking:
        expert_E = torch.tensor(self.without, device=picking.order_TM.device)
        return replace(picking, order_TM=picking.order_TM.index_fill(-1, expert_E, float("-inf")), excluded=True)


def replace_excluded(picking: Picking, excluded_M: Tensor) -> Picking:
    """The router's own picks, with the next best in the place of excluded ones.

    Args:
        picking: whose order leaves them out.
        excluded_M: which they are.
    """
    choice_TK, columns = picking.choice_TK, picking.routing.num_columns
    out_TK = torch.cat([excluded_M, excluded_M.new_zeros(1)])[choice_TK]
    taken_TM = torch.zeros_like(picking.order_TM, dtype=torch.bool)
    taken_TM = torch.cat([taken_TM, taken_TM[:, :1]], -1).scatter(-1, choice_TK, True)[:, :columns]
    free_TM = picking.order_TM.masked_fill(taken_TM, float("-inf"))
    width = min(choice_TK.shape[-1], columns)
    best_TM = free_TM.sort(dim=-1, descending=True, stable=True)
    # Where a token has picked all that are left, the place stays empty.
    next_TK = best_TM.indices[:, :width].masked_fill(best_TM.values[:, :width] == float("-inf"), columns)
    place_TK = (out_TK.cumsum(-1) - 1).clamp(min=0, max=width - 1)
    new_TK = torch.where(out_TK, next_TK.gather(-1, place_TK), choice_TK)
    weight_TK = picking.weights()
    changed = picking.chosen(new_TK)
    return replace(changed, weight_TK=torch.where(out_TK.any(-1, keepdim=True), changed.weights(), weight_TK))
