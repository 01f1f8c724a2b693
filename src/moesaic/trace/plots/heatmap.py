"""Heat maps as SVG around a picture with one pixel a cell."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from moesaic.trace.plots import marks
from moesaic.trace.plots.colours import DIVERGING, EMPTY, LEVELS, NOT_USED, SEQUENTIAL, hexadecimal, ramp
from moesaic.trace.plots.image import data_uri
from moesaic.trace.plots.specs import HeatMap

_EXTRA = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in (EMPTY, NOT_USED)]
_EMPTY_LEVEL, _ZERO_LEVEL = LEVELS, LEVELS + 1


def heat_map(plot: HeatMap, label: str) -> Markup:
    """The plot; every cell is one pixel of a picture, so that 100,000 cells are one node."""
    rows, columns = plot.values_RC.shape
    left = max(marks.LEFT, 30.0 + 6.5 * max(map(len, plot.row_names)))
    longest = 6.6 * max(map(len, plot.column_names)) + 10
    width = min((plot.width - left - 8) / columns, max(40.0, longest))
    height = max(min(width, 26.0) if rows > 1 else 26.0, min(18.0, marks.FULL_HEIGHT / rows))
    if rows != columns:  # a square matrix has square cells
        height = min(height, max(marks.FULL_HEIGHT / rows, 8.0))
    right, bottom = left + width * columns, marks.TOP + height * rows
    picture = data_uri(levels(plot), palette(plot))
    parts = [
        f'<image x="{left:g}" y="{marks.TOP:g}" width="{width * columns:.2f}" height="{height * rows:.2f}"'
        f' preserveAspectRatio="none" href="{picture}"/>',
        _gaps(left, width, height, rows, columns),
        f'<rect x="{left:g}" y="{marks.TOP:g}" width="{width * columns:.2f}" height="{height * rows:.2f}" class="frame"/>',
    ]
    parts += marks.ticks(plot.column_names, width, max(30.0, longest), lambda at: (left + at, bottom + 16), "middle")
    parts += marks.ticks(plot.row_names, height, 14.0, lambda at: (left - 8, marks.TOP + at + 4), "end")
    parts.append(marks.text(max((left + right) / 2, left + 40), bottom + 34, plot.column_title, "middle", "axis"))
    parts.append(marks.vertical(14, (marks.TOP + bottom) / 2, plot.row_title))
    parts += _legend(plot, left, bottom + 62)
    place = f'data-x="{left:g}" data-y="{marks.TOP:g}" data-w="{width:.5g}" data-h="{height:.5g}"'
    shape = f'data-rows="{rows}" data-columns="{columns}"'
    return marks.svg(parts, plot.width, bottom + 96, label, f'class="heatmap" {place} {shape}')


def levels(plot: HeatMap) -> np.ndarray:
    """Number of each cell's colour in `palette`, uint8 (R, C)."""
    known = np.isfinite(plot.values_RC)
    values = np.where(known, plot.values_RC, 1.0)
    if plot.scale == "ratio":
        reach = ratio_reach(plot)
        with np.errstate(divide="ignore"):
            share = np.clip(np.log2(values) / reach, -1.0, 1.0) / 2 + 0.5
        found = np.where(values == 0, _ZERO_LEVEL, np.rint(share * (LEVELS - 1)))
    else:
        found = np.rint(np.clip(values / maximum_of(plot), 0.0, 1.0) * (LEVELS - 1))
    return np.where(known, found, _EMPTY_LEVEL).astype(np.uint8)


def palette(plot: HeatMap) -> np.ndarray:
    """Colours of a plot, uint8 (C, 3): its scale, then those of empty and of unused cells."""
    scale = ramp(DIVERGING if plot.scale == "ratio" else SEQUENTIAL)
    return np.concatenate([scale, np.array(_EXTRA, dtype=np.uint8)])


def maximum_of(plot: HeatMap) -> float:
    """Value of the darkest colour of a sequential scale."""
    if plot.maximum is not None:
        return plot.maximum
    return float(np.nanmax(plot.values_RC, initial=0.0)) or 1.0


def ratio_reach(plot: HeatMap) -> int:
    """Powers of two that the ratio scale reaches in both directions, 1 to 4: nearly all values lie within."""
    values = plot.values_RC[np.isfinite(plot.values_RC) & (plot.values_RC > 0)]
    if not len(values):
        return 1
    return int(np.clip(np.ceil(np.quantile(np.abs(np.log2(values)), 0.99) - 0.05), 1, 4))


def _gaps(left: float, width: float, height: float, rows: int, columns: int) -> str:
    """White lines between cells that are large enough to spare them."""
    drawn = ""
    if width >= 7:
        drawn += "".join(f"M{left + width * c:.2f} {marks.TOP:g}v{height * rows:.2f}" for c in range(1, columns))
    if height >= 7:
        drawn += "".join(f"M{left:g} {marks.TOP + height * r:.2f}h{width * columns:.2f}" for r in range(1, rows))
    return f'<path class="gap" d="{drawn}"/>' if drawn else ""


def _legend(plot: HeatMap, left: float, top: float) -> list[str]:
    """The scale with its values, and what the other colours mean."""
    width, colours = 240.0, palette(plot)
    step = width / LEVELS
    parts = [marks.text(left, top - 5, plot.value_title, "start")]
    parts += [
        f'<rect x="{left + level * step:.2f}" y="{top:g}" width="{step + 0.5:.2f}" height="11"'
        f' fill="{hexadecimal(colours[level])}"/>'
        for level in range(LEVELS)
    ]
    parts.append(f'<rect x="{left:g}" y="{top:g}" width="{width:.2f}" height="11" class="frame"/>')
    if plot.scale == "ratio":
        reach = ratio_reach(plot)
        names = {-4: "1/16", -3: "1/8", -2: "1/4", -1: "1/2", 0: "1", 1: "2", 2: "4", 3: "8", 4: "16"}
        for power in range(-reach, reach + 1):
            end = "≤ " if power == -reach else "≥ " if power == reach else ""
            x = left + width * (power + reach) / (2 * reach)
            parts.append(marks.text(x, top + 24, end + names[power], "middle"))
    else:
        top_value = maximum_of(plot)
        parts += [
            marks.text(left + width * part, top + 24, f"{top_value * part:.3g}", "middle") for part in (0.0, 0.5, 1.0)
        ]
    extra = [
        ("ratio", plot.values_RC == 0, NOT_USED, "never picked"),
        ("", np.isnan(plot.values_RC), EMPTY, "no value"),
    ]
    x = left + width + 24
    for scale, cells, colour, words in extra:
        if cells.any() and scale in ("", plot.scale):
            parts.append(f'<rect x="{x:g}" y="{top:g}" width="11" height="11" fill="{colour}"/>')
            parts.append(marks.text(x + 17, top + 10, words, "start"))
            x += 110
    return parts
