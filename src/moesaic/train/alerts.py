"""Alerts: a layer whose routing collapses is named when it does, and when it has recovered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import Field, PositiveInt

from moesaic.configuration import Config
from moesaic.train.routing_load import LayerStatistics

State = Literal["started", "ended"]

_BALANCE = (
    "what usually helps: a larger coefficient of the balance loss, selection_bias with selection_bias_update, a z_loss, more "
    "warm-up or a lower learning_rate"
)
_HELP = {
    "entropy": _BALANCE,
    "unused_share": _BALANCE,
    "max_violation": _BALANCE,
    "drop_rate": "what usually helps: a larger moe.capacity.factor, or a larger coefficient of the balance loss",
    "null_share": "what usually helps: fewer null experts, or a smaller coefficient of the loss that favours them",
}
_SHOWN = 3  # layers that a line spells out


class AlertsConfig(Config):
    """When a layer counts as collapsed; each threshold may be null, for never.

    Statistics are those of `LayerStatistics`, over the tokens since the last check. Layers with fewer than 8 picks for each
    expert since then are not judged.

    Attributes:
        entropy: alert below this entropy of the load, over that of an even load. One expert of all has 0, K of them have
            log K / log N; trained models have 0.9 and more.
        unused_share: alert above this share of experts without any token.
        max_violation: alert above this largest load over the mean load, minus 1. It can't exceed N / K - 1.
        drop_rate: alert above this share of picks that a capacity dropped.
        null_share: alert above this share of selections that are null experts.
        patience: checks in a row that a layer must be beyond a threshold until it is named, and within all of them until it
            counts as recovered.
    """

    entropy: float | None = Field(default=0.6, ge=0, le=1)
    unused_share: float | None = Field(default=0.25, ge=0, le=1)
    max_violation: float | None = Field(default=8.0, gt=0)
    drop_rate: float | None = Field(default=0.3, ge=0, le=1)
    null_share: float | None = Field(default=0.95, ge=0, le=1)
    patience: PositiveInt = 2

    def breaches(self, statistics: LayerStatistics) -> tuple[Breach, ...]:
        """The thresholds that a layer is beyond."""
        found = []
        for name in ("entropy", "unused_share", "max_violation", "drop_rate", "null_share"):
            threshold, value = getattr(self, name), getattr(statistics, name)
            if threshold is not None and (value < threshold if name == "entropy" else value > threshold):
                found.append(Breach(name, value, threshold))
        return tuple(found)


@dataclass(frozen=True)
class Breach:
    """A threshold that a layer is beyond."""

    metric: str
    value: float
    threshold: float

    def __str__(self) -> str:
        name, sign = self.metric.replace("_", " "), "<" if self.metric == "entropy" else ">"
        if self.metric in ("entropy", "max_violation"):
            return f"{name} {self.value:.2f} {sign} {self.threshold:g}"
        return f"{name} {self.value:.0%} {sign} {self.threshold:.0%}"


@dataclass(frozen=True)
class Alert:
    """A layer that has collapsed, or recovered.

    Attributes:
        step: optimiser steps made.
        layer: index of the decoder layer.
        state: "started" or "ended".
        breaches: what it is beyond, empty when it has ended.
        since: of one that has ended, the step at which it started.
    """

    step: int
    layer: int
    state: State
    breaches: tuple[Breach, ...] = ()
    since: int | None = None

    def record(self) -> dict[str, Any]:
        """The line of the metrics file."""
        found = {"type": "alert", "step": self.step, "layer": self.layer, "state": self.state}
        if self.state == "ended":
            return {**found, "since": self.since}
        return {**found, "breaches": [asdict(breach) for breach in self.breaches]}


def describe_alerts(alerts: list[Alert]) -> list[str]:
    """A line for the layers that have collapsed, and one for those that have recovered."""
    lines = []
    started = [alert for alert in alerts if alert.state == "started"]
    if started:
        named = [f"layer {alert.layer}: {', '.join(map(str, alert.breaches))}" for alert in started[:_SHOWN]]
        helps = dict.fromkeys(_HELP[breach.metric] for alert in started for breach in alert.breaches)
        lines.append(
            f"ALERT step {started[0].step}: routing collapses in {'; '.join(named)}{_more(started)}. {'; '.join(helps)}"
        )
    ended = [alert for alert in alerts if alert.state == "ended"]
    if ended:
        named = [f"layer {alert.layer} (since step {alert.since})" for alert in ended[:_SHOWN]]
        lines.append(f"alert over, step {ended[0].step}: routing has recovered in {', '.join(named)}{_more(ended)}")
    return lines


def _more(alerts: list[Alert]) -> str:
    rest = [str(alert.layer) for alert in alerts[_SHOWN:]]
    return f" and {len(rest)} more layers ({', '.join(rest)})" if rest else ""


@dataclass
class _Layer:
    """How many checks in a row a layer was beyond a threshold, or within all while alerted."""

    checks: int = 0
    since: int | None = None


@dataclass
class AlertMonitor:
    """Follows the layers of a training.

    Attributes:
        config: the thresholds.
    """

    config: AlertsConfig
    _layers: dict[int, _Layer] = field(default_factory=dict)

    def check(self, step: int, statistics: Mapping[int, LayerStatistics]) -> list[Alert]:
        """The alerts that start or end with this check.

        Args:
            step: optimiser steps made.
            statistics: of each layer since the last check.
        """
        found = []
        for layer, values in statistics.items():
            if not values.judged:
                continue
            followed = self._layers.setdefault(layer, _Layer())
            breaches = self.config.breaches(values)
            turns = not breaches if followed.since is not None else bool(breaches)
            followed.checks = followed.checks + 1 if turns else 0
            if followed.checks < self.config.patience:
                continue
            followed.checks = 0
            if followed.since is None:
                followed.since = step
                found.append(Alert(step, layer, "started", breaches))
            else:
                found.append(Alert(step, layer, "ended", since=followed.since))
                followed.since = None
        return found

    @property
    def alerted(self) -> list[int]:
        """Layers that have collapsed and not recovered."""
        return sorted(layer for layer, followed in self._layers.items() if followed.since is not None)

    def state_dict(self) -> dict[int, list[int | None]]:
        """What a resumed training needs."""
        return {layer: [followed.checks, followed.since] for layer, followed in self._layers.items()}

    def load_state_dict(self, state: Mapping[int, list[Any]]) -> None:
        """Go on from what `state_dict` returned."""
        self._layers = {layer: _Layer(checks, since) for layer, (checks, since) in state.items()}
