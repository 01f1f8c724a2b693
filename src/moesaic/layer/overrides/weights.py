"""Other weights for the same picks: scaled, brought to a sum, sharpened."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from moesaic.layer.overrides.base import OverridePart, Phase, Picking


class ScaledWeights(OverridePart):
    """All weights of a token times a number; nothing is renormalised.

    Attributes:
        scale: the number, above 0.
    """

    phase: ClassVar = Phase.WEIGH
    reweighs: ClassVar = False

    type: Literal["scale"] = "scale"
    scale: float = Field(gt=0)

    def apply(self, picking: Picking) -> Picking:
        return replace(picking, weight_TK=picking.weights() * self.scale)


class TotalWeights(OverridePart):
    """Weights divided by their sum over the token's picks, times a number. A token without picks keeps none.

    Attributes:
        total: the sum that they then have, above 0.
    """

    phase: ClassVar = Phase.WEIGH
    reweighs: ClassVar = False

    type: Literal["total"] = "total"
    total: float = Field(default=1.0, gt=0)

    def apply(self, picking: Picking) -> Picking:
        weight_TK = picking.weights()
        sum_T1 = weight_TK.sum(-1, keepdim=True)
        return replace(picking, weight_TK=weight_TK * (self.total / torch.where(sum_T1 == 0, 1.0, sum_T1)))


class TemperedWeights(OverridePart):
    """Each weight to the power 1 / temperature, then all of a token's scaled so that their sum is what it was.

    Below 1 the best pick gains, above 1 weights come closer. Where weights are a softmax over the picks, this is the
    softmax of logits / temperature over them.

    Attributes:
        temperature: above 0.
    """

    phase: ClassVar = Phase.WEIGH
    reweighs: ClassVar = False

    type: Literal["temperature"] = "temperature"
    temperature: float = Field(gt=0)

    def apply(self, picking: Picking) -> Picking:
        weight_TK = picking.weights()
        some_TK = weight_TK > 0
        # A row without weights, and 0 to a power, would have a gradient of NaN.
        log_TK = torch.where(some_TK, weight_TK, 1.0).log() / self.temperature
        hidden_TK = ~some_TK & some_TK.any(-1, keepdim=True)
        share_TK = log_TK.masked_fill(hidden_TK, float("-inf")).softmax(-1) * some_TK
        return replace(picking, weight_TK=share_TK * weight_TK.sum(-1, keepdim=True))
