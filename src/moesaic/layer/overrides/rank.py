"""The experts of certain ranks only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt, model_validator

from moesaic.layer.overrides.base import KeysOn, OverridePart, Phase, Picking, check_at_most, check_distinct
from moesaic.layer.routers.base import Router


class Rank(OverridePart):
    """The expert with the k-th largest score alone, or those of several ranks: rank-k routing of SCMoE (arXiv 2405.14507,
    section 2.2 and equation 4).

    Ranks count from 1, go by what the router's own selection compares (with selection bias, inside the groups that it
    admits for the token), and equal experts rank by their number. The weight follows the router's rule at that pick: 1
    where it normalises, the plain score where it does not; add `total: 1` for weight 1 everywhere.

    Attributes:
        rank: one or several, from 1.
    """

    phase: ClassVar = Phase.CHOOSE
    ranks: ClassVar = True

    type: Literal["rank"] = "rank"
    rank: tuple[PositiveInt, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Rank:
        check_distinct("rank", self.rank)
        return self

    def check(self, layer: int, router: Router) -> None:
        super().check(layer, router)
        check_at_most("rank", max(self.rank), router.most_admitted, layer, "experts that a token may have")

    def picks(self, layer: int, num_experts: int, keys: KeysOn) -> Sequence[int]:
        return self.rank

    def apply(self, picking: Picking) -> Picking:
        last = max(self.rank)
        picking.require(last, f"rank = {last}")
        place_K = torch.tensor(self.rank, device=picking.order_TM.device) - 1
        return picking.chosen(picking.ranked(last).index_select(-1, place_K))
