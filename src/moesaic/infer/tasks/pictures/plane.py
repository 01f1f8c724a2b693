"""A grid of two parameters as a heat map: what each decoding gains on the first one."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesaic.infer.tasks.pictures.grids import Grid
from moesaic.infer.tasks.sweep import Axis, Sweep, SweepPoint
from moesaic.trace.plots.colours import DIVERGING, EMPTY

_UNITS: dict[Axis, str] = {
    "seconds": "x seconds of {first}",
    "bytes": "x bytes of {first}",
    "positions": "positions for each new token",
}


def draw_plane(sweep: Sweep, grid: Grid, figure: Any, axis: Axis) -> None:
    """Fill a figure of matplotlib: a row for each line of the grid, a column for each value along it."""
    from matplotlib.colors import LinearSegmentedColormap

    columns = sorted({value for line in grid.lines for value in line.points})
    first = sweep.points[0]
    gain_RC = np.full((len(grid.lines), len(columns)), np.nan)
    cells: dict[tuple[int, int], SweepPoint] = {}
    for row, line in enumerate(grid.lines):
        for value, point in line.points.items():
            cells[row, columns.index(value)] = point
            gain_RC[row, columns.index(value)] = 100 * (point.accuracy.value - first.accuracy.value)
    # What is within the interval of the first decoding stays pale.
    noise = 50 * (first.accuracy.high - first.accuracy.low)
    reach = max(float(np.nanmax(np.abs(gain_RC))), noise)
    colours = LinearSegmentedColormap.from_list("gain", DIVERGING).with_extremes(bad=EMPTY)
    axes = figure.subplots()
    image = axes.imshow(gain_RC, cmap=colours, vmin=-reach, vmax=reach, aspect="auto")
    for (row, column), point in cells.items():
        compared = point.compared
        sure = compared is not None and compared.p_value < 0.05
        dark = abs(gain_RC[row, column]) > 0.6 * reach
        axes.text(
            column,
            row,
            f"{100 * point.accuracy.value:.1f} %{'*' if sure else ''}\n{point.cost_on(axis):.2f}",
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold" if point is sweep.best else "normal",
            color="white" if dark else "black",
        )
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axes.set_yticks(range(len(grid.lines)), [f"{line.values[0]:g}" for line in grid.lines])
    axes.set(xlabel=grid.along, ylabel=grid.across[0])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(grid.lines) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    axes.set_title(
        f"{grid.name}: right answers (* p < 0.05), below them {_UNITS[axis].format(first=first.label)}",
        loc="left",
        fontsize=9,
    )
    figure.colorbar(image, ax=axes, fraction=0.04, label=f"points above {first.label}")
