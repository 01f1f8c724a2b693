"""Balance losses and load statistics: pure functions of the record, one mechanism a file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moesaic.layer.balance.adaptive import AdaptiveCoefficient
from moesaic.layer.balance.base import BalanceLoss
from moesaic.layer.balance.coefficients import Coefficients
from moesaic.layer.balance.depth import DepthLoss
from moesaic.layer.balance.device_balance import CommunicationBalance, DeviceBalance
from moesaic.layer.balance.entropy import GlobalEntropy, LocalEntropy
from moesaic.layer.balance.importance import Importance
from moesaic.layer.balance.load_balancing import LoadBalancing
from moesaic.layer.balance.mutual_information import MutualInformation
from moesaic.layer.balance.objective import BalanceObjective
from moesaic.layer.balance.router_loss import RouterLoss
from moesaic.layer.balance.selection_bias import SelectionBiasUpdate
from moesaic.layer.balance.smooth_load import SmoothLoad
from moesaic.layer.balance.soft_load_balancing import SoftLoadBalancing
from moesaic.layer.balance.stable_balance import StableBalance
from moesaic.layer.balance.statistics import expert_load, max_violation, routing_entropy
from moesaic.layer.balance.z_loss import ZLoss

# The registry: a union discriminated by `type`.
BalanceConfig = Annotated[
    LoadBalancing
    | SoftLoadBalancing
    | Importance
    | SmoothLoad
    | DeviceBalance
    | CommunicationBalance
    | MutualInformation
    | LocalEntropy
    | GlobalEntropy
    | StableBalance
    | DepthLoss
    | RouterLoss
    | ZLoss,
    Field(discriminator="type"),
]

__all__ = [
    "AdaptiveCoefficient",
    "BalanceConfig",
    "BalanceLoss",
    "BalanceObjective",
    "Coefficients",
    "CommunicationBalance",
    "DepthLoss",
    "DeviceBalance",
    "GlobalEntropy",
    "Importance",
    "LoadBalancing",
    "LocalEntropy",
    "MutualInformation",
    "RouterLoss",
    "SelectionBiasUpdate",
    "SmoothLoad",
    "SoftLoadBalancing",
    "StableBalance",
    "ZLoss",
    "expert_load",
    "max_violation",
    "routing_entropy",
]
