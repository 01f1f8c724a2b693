"""Routing overrides for users: as data, by row, on our models and on stock ones."""

from __future__ import annotations

from moesaic.infer.decode.overrides.apply import check_override, override_routing
from moesaic.infer.decode.overrides.replayed import ReplayedTrace
from moesaic.infer.decode.overrides.spec import OverrideLike, OverrideSpec
from moesaic.infer.decode.overrides.switch import RoutingSwitch

__all__ = ["OverrideLike", "OverrideSpec", "ReplayedTrace", "RoutingSwitch", "check_override", "override_routing"]
