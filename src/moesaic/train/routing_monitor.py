"""What a run reports of its routing every so many steps: statistics of each layer, and alerts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moesaic.layer import LayerLoad
from moesaic.train.alerts import Alert, AlertMonitor, AlertsConfig
from moesaic.train.routing_load import LayerStatistics, statistics_of


class RoutingMonitor:
    """Sums the loads of steps and reports on them.

    Args:
        every: steps between reports; None for none.
        alerts: thresholds; None for no alerts.
    """

    def __init__(self, every: int | None, alerts: AlertsConfig | None) -> None:
        self._every = every
        self._alerts = AlertMonitor(alerts) if alerts is not None else None
        self._loads: dict[int, LayerLoad] = {}

    def add(self, loads: Mapping[int, LayerLoad]) -> None:
        """Count the load of a step, summed over processes."""
        if self._every is None:
            return
        for layer, load in loads.items():
            self._loads[layer] = self._loads[layer] + load if layer in self._loads else load

    def report(self, step: int, *, last: bool = False) -> tuple[list[dict[str, Any]], list[Alert]]:
        """Records for the metrics, and the alerts among them; empty where none are due.

        Args:
            step: optimiser steps made.
            last: these were all.
        """
        if self._every is None or not self._loads or (step % self._every and not last):
            return [], []
        loads, self._loads = self._loads, {}
        statistics = statistics_of(loads)
        alerts = [] if self._alerts is None else self._alerts.check(step, statistics)
        return [routing_record(step, statistics), *(alert.record() for alert in alerts)], alerts

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs."""
        loads = {
            layer: [load.chosen_M.cpu(), load.load_N.cpu(), load.dropped.cpu(), load.tokens.cpu()]
            for layer, load in self._loads.items()
        }
        return {"loads": loads, "alerts": {} if self._alerts is None else self._alerts.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` returned."""
        self._loads = {
            layer: LayerLoad(*(part.to(device) for part in parts)) for layer, parts in state["loads"].items()
        }
        if self._alerts is not None:
            self._alerts.load_state_dict(state["alerts"])


def routing_record(step: int, statistics: Mapping[int, LayerStatistics]) -> dict[str, Any]:
    """The line of the metrics file: lists with a value for each of `layers`; what is 0 everywhere is left out."""
    values: dict[str, Any] = {
        name: [round(getattr(layer, name), 5) for layer in statistics.values()]
        for name in ("max_violation", "entropy", "unused_share", "drop_rate", "null_share")
    }
    for name in ("drop_rate", "null_share"):
        if not any(values[name]):
            del values[name]
    load = [list(layer.load) for layer in statistics.values()]
    return {"type": "routing", "step": step, "layers": list(statistics), **values, "load": load}
