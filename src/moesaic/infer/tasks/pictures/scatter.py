"""Accuracy against cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moesaic.infer.tasks.pictures.grids import grids_of
from moesaic.infer.tasks.sweep import Axis, Sweep, SweepPoint
from moesaic.trace.plots.colours import CATEGORIES

_MARKERS = "osD^vP"
_AXES: dict[Axis, str] = {
    "seconds": "seconds for a new token, as a multiple of those of {first}",
    "bytes": "weights read for a new token, as a multiple of those of {first}",
    "positions": "tokens that go through the model for each new token",
}


def draw_scatter(sweep: Sweep, figure: Any, axis: Axis) -> None:
    """Fill a figure of matplotlib: decodings with their 95 % intervals, grids as lines, the Pareto front behind them."""
    axes = figure.subplots()
    first = sweep.points[0]
    axes.axhline(100 * first.accuracy.value, color="#8a94a3", linewidth=0.8, linestyle=":", zorder=0)
    front = sweep.front(axis)
    axes.step(
        [point.cost_on(axis) for point in front],
        [100 * point.accuracy.value for point in front],
        where="post",
        color="#c3cad4",
        linewidth=6,
        solid_capstyle="round",
        zorder=1,
        label="Pareto front",
    )
    grids, alone = grids_of([point for point in sweep.points if point is not first])
    style = 0
    for grid in grids:
        marker = _MARKERS[grids.index(grid) % len(_MARKERS)]
        for line in grid.lines:
            colour = CATEGORIES[style % len(CATEGORIES)]
            points = list(line.points.values())
            values = ", ".join(f"{value:g}" for value in line.points)
            _points(axes, points, axis, colour, marker, f"{grid.label(line)}: {grid.along} {values}")
            for value, point in line.points.items():
                _named(axes, point, axis, f"{value:g}", colour)
            style += 1
    for point in alone:
        colour = CATEGORIES[style % len(CATEGORIES)]
        _points(axes, [point], axis, colour, "X", point.label)
        style += 1
    _points(axes, [first], axis, "black", "*", f"{first.label}, with which all are compared", size=12)
    axes.set(xlabel=_AXES[axis].format(first=first.label), ylabel="right answers, %")
    axes.margins(x=0.08, y=0.08)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    items = first.accuracy.items
    axes.set_title(f"Accuracy on {items:,} items, with 95 % intervals", loc="left", fontsize=10)


def _points(
    axes: Any, points: Sequence[SweepPoint], axis: Axis, colour: str, marker: str, label: str, *, size: float = 5
) -> None:
    costs = [point.cost_on(axis) for point in points]
    values = [100 * point.accuracy.value for point in points]
    spread = [
        [value - 100 * point.accuracy.low for value, point in zip(values, points, strict=True)],
        [100 * point.accuracy.high - value for value, point in zip(values, points, strict=True)],
    ]
    axes.errorbar(costs, values, yerr=spread, fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.35, zorder=2)
    axes.plot(costs, values, marker=marker, color=colour, markersize=size, linewidth=1.1, label=label, zorder=3)


def _named(axes: Any, point: SweepPoint, axis: Axis, name: str, colour: str) -> None:
    place = (point.cost_on(axis), 100 * point.accuracy.value)
    axes.annotate(name, place, (5, 4), textcoords="offset points", fontsize=7, color=colour, zorder=4)
