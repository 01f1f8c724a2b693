"""The same experts for every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, model_validator

from moesaic.errors import UnsupportedOverride
from moesaic.layer.overrides.base import KeysOn, OverridePart, Phase, Picking, check_distinct, check_experts
from moesaic.layer.routers.base import Router


class FixedExperts(OverridePart):
    """These experts and no others, for every token, also where its groups would not admit them.

    Weights follow the router's rule at these picks, so they differ from token to token.

    Attributes:
        experts: their numbers, from 0.
    """

    phase: ClassVar = Phase.CHOOSE

    type: Literal["experts"] = "experts"
    experts: tuple[NonNegativeInt, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> FixedExperts:
        check_distinct("experts", self.experts)
        return self

    def check(self, layer: int, router: Router) -> None:
        super().check(layer, router)
        check_experts("experts", self.experts, router, layer)
        if "modality" in router.config.needs:
            raise UnsupportedOverride(
                f"experts can't act in layer {layer}: its router ({router.config.type}) has no scores for experts of other "
                "modalities; use rank, k or without"
            )

    def picks(self, layer: int, num_experts: int, keys: KeysOn) -> Sequence[int]:
        return [-1 - expert for expert in self.experts]

    def apply(self, picking: Picking) -> Picking:
        expert_K = torch.tensor(self.experts, device=picking.order_TM.device)
        return picking.chosen(expert_K.expand(picking.order_TM.shape[0], -1).contiguous())
