"""Balance losses and load statistics: pure functions of the record, one mechanism a file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moesaic.layer.balance.adaptive import AdaptiveCoefficient
from moesaic.layer.balance.base import BalanceLoss
from moesaic.layer.balance.coefficients import Coefficients
from moesaic.layer.balance.distillation import Distillation
from moesaic.layer.balance.load_balancing import LoadBalancing
from moesaic.layer.balance.objective import BalanceObjective
from moesaic.layer.balance.selection_bias import SelectionBiasUpdate
from moesaic.layer.balance.statistics import expert_load, max_violation, routing_entropy
from moesaic.layer.balance.z_loss import ZLoss

# The registry: a union discriminated by `type`.
BalanceConfig = Annotated[Distillation | LoadBalancing | ZLoss, Field(discriminator="type")]

__all__ = [
    "AdaptiveCoefficient",
    "BalanceConfig",
    "BalanceLoss",
    "BalanceObjective",
    "Coefficients",
    "Distillation",
    "LoadBalancing",
    "SelectionBiasUpdate",
    "ZLoss",
    "expert_load",
    "max_violation",
    "routing_entropy",
]
