"""Plots as inline SVG text: they need no library, stay sharp in print, and follow the page's colours through CSS classes.

Every function escapes the names it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup, escape

# ColorBrewer "YlGnBu": sequential, safe for colour-blind readers, monotone in grey, light where there is little ink.
ANCHORS = ("#ffffd9", "#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#253494", "#081d58")
LEVELS = 33
WIDTH = 1000.0
LEFT, TOP = 64.0, 8.0


def heatmap(
    values_RC: np.ndarray,
    *,
    label: str,
    row_title: str,
    column_title: str,
    row_names: Sequence[str],
    column_names: Sequence[str],
    maximum: float | None = None,
    reference: tuple[float, str] | None = None,
    mark_zeros: bool = False,
    width: float = WIDTH,
) -> Markup:
    """A matrix as coloured cells with a colour bar; cells of NaN stay empty.

    Args:
        values_RC: values from 0.
        label: what a screen reader says.
        row_title: name of the vertical axis.
        column_title: name of the horizontal axis.
        row_names: R names, thinned out where they would overlap.
        column_names: C names, likewise.
        maximum: value of the darkest colour; the largest value by default.
        reference: a value to mark on the colour bar, and its name.
        mark_zeros: cross out cells that are exactly 0.
        width: of the drawing, in its own units.
    """
    rows, columns = values_RC.shape
    left = max(LEFT, 30.0 + 6.5 * max(map(len, row_names)))
    top_value = float(maximum if maximum is not None else np.nanmax(values_RC, initial=0.0)) or 1.0
    cell_width = min((width - left - 8) / columns, 40.0)
    cell_height = min(cell_width, 26.0) if rows > 1 else 26.0
    cell_height = max(cell_height, min(18.0, 480 / rows))
    right, bottom = left + cell_width * columns, TOP + cell_height * rows
    parts = [
        f'<g transform="translate({left:g} {TOP:g}) scale({cell_width:.4g} {cell_height:.4g})" class="cells">',
        f'<rect width="{columns}" height="{rows}" class="empty"/>',
        *_cells(values_RC, top_value),
        "</g>",
    ]
    if mark_zeros:
        parts += [
            _cross(left, TOP, cell_width, cell_height, row, column) for row, column in np.argwhere(values_RC == 0)
        ]
    parts += _ticks(column_names, cell_width, 30.0, lambda at: (left + at, bottom + 16), "middle")
    parts += _ticks(row_names, cell_height, 14.0, lambda at: (left - 8, TOP + at + 4), "end")
    parts.append(_text((left + right) / 2, bottom + 36, column_title, "middle", "axis"))
    parts.append(_vertical(14, (TOP + bottom) / 2, row_title))
    parts += _colour_bar(left, bottom + 54, min(260.0, width - left - 60), top_value, reference)
    grid = f'data-x="{left:g}" data-y="{TOP:g}" data-w="{cell_width:.4g}" data-h="{cell_height:.4g}"'
    return _svg(parts, width, bottom + 92, label, f'class="heatmap" {grid} data-rows="{rows}" data-columns="{columns}"')


def bars(
    values_C: np.ndarray,
    *,
    label: str,
    column_title: str,
    value_title: str,
    names: Sequence[str],
    maximum: float | None = None,
    reference: tuple[float, str] | None = None,
    width: float = WIDTH,
    height: float = 220.0,
) -> Markup:
    """Values as vertical bars from 0, each with its value as tooltip.

    Args:
        values_C: values from 0.
        label: what a screen reader says.
        column_title: name of the horizontal axis.
        value_title: name of the vertical axis.
        names: name of each bar, thinned out where they would overlap.
        maximum: top of the axis; a little above the largest value by default.
        reference: a value to draw a line at, and its name.
        width: of the drawing, in its own units.
        height: of the plotting area.
    """
    above = max(float(values_C.max(initial=0.0)), reference[0] if reference else 0.0)
    steps = _axis(maximum if maximum is not None else above * 1.05)
    scale = height / steps[-1]
    slot = (width - LEFT - 8) / len(values_C)
    bar = min(slot * 0.78, 44.0)
    bottom = TOP + height
    parts = [
        f'<line x1="{LEFT:g}" x2="{width - 8:g}" y1="{bottom - step * scale:.2f}" y2="{bottom - step * scale:.2f}" class="grid"/>'
        + _text(LEFT - 8, bottom - step * scale + 4, f"{step:g}", "end")
        for step in steps
    ]
    for index, value in enumerate(values_C.tolist()):
        x, tall = LEFT + slot * (index + 0.5) - bar / 2, value * scale
        parts.append(
            f'<rect x="{x:.2f}" y="{bottom - tall:.2f}" width="{bar:.2f}" height="{tall:.2f}" class="bar">'
            f"<title>{escape(column_title)} {escape(names[index])}: {value:.4g}</title></rect>"
        )
    if reference is not None:
        y = bottom - reference[0] * scale
        parts.append(f'<line x1="{LEFT:g}" x2="{width - 8:g}" y1="{y:.2f}" y2="{y:.2f}" class="reference"/>')
        parts.append(_text(width - 10, y - 6, reference[1], "end", "halo"))
    parts += _ticks(names, slot, 30.0, lambda at: (LEFT + at, bottom + 16), "middle")
    parts.append(_text((LEFT + width) / 2, bottom + 36, column_title, "middle", "axis"))
    parts.append(_vertical(14, (TOP + bottom) / 2, value_title))
    return _svg(parts, width, bottom + 44, label, 'class="bars"')


def colour(level: int) -> str:
    """Hex colour of a level from 0 to LEVELS - 1, interpolated between the anchors."""
    place = level / (LEVELS - 1) * (len(ANCHORS) - 1)
    below = min(int(place), len(ANCHORS) - 2)
    low, high = (np.array([int(ANCHORS[at][i : i + 2], 16) for i in (1, 3, 5)]) for at in (below, below + 1))
    mixed = np.rint(low + (high - low) * (place - below)).astype(int)
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _cells(values_RC: np.ndarray, top_value: float) -> list[str]:
    """One path for each colour: a cell then costs a dozen bytes, so pages with 100,000 cells stay light."""
    known = np.isfinite(values_RC)
    share = np.clip(np.where(known, values_RC, 0.0) / top_value, 0.0, 1.0)
    levels = np.where(known, np.rint(share * (LEVELS - 1)).astype(int), -1)
    paths = []
    for level in range(LEVELS):
        places = np.argwhere(levels == level)
        if len(places):
            drawn = "".join(f"M{column} {row}h1v1h-1z" for row, column in places)
            paths.append(f'<path fill="{colour(level)}" d="{drawn}"/>')
    return paths


def _cross(left: float, top: float, width: float, height: float, row: int, column: int) -> str:
    x, y, half = left + (column + 0.5) * width, top + (row + 0.5) * height, min(width, height) * 0.22
    return (
        f'<path class="cross" d="M{x - half:.2f} {y - half:.2f}l{2 * half:.2f} {2 * half:.2f}'
        f'm0 {-2 * half:.2f}l{-2 * half:.2f} {2 * half:.2f}"/>'
    )


def _colour_bar(
    left: float, top: float, width: float, top_value: float, reference: tuple[float, str] | None
) -> list[str]:
    step = width / LEVELS
    parts = [
        f'<rect x="{left + level * step:.2f}" y="{top:g}" width="{step + 0.5:.2f}" height="12" fill="{colour(level)}"/>'
        for level in range(LEVELS)
    ]
    parts.append(f'<rect x="{left:g}" y="{top:g}" width="{width:.2f}" height="12" class="frame"/>')
    parts += [
        _text(left, top + 28, "0", "middle"),
        _text(left + width, top + 28, f"{top_value:.3g}", "middle"),
    ]
    if reference is not None and 0.08 * top_value < reference[0] < 0.92 * top_value:
        x = left + width * reference[0] / top_value
        parts.append(f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{top - 3:g}" y2="{top + 15:g}" class="reference"/>')
        parts.append(_text(x, top + 28, reference[1], "middle"))
    return parts


def _ticks(
    names: Sequence[str], step: float, room: float, place: Callable[[float], tuple[float, float]], anchor: str
) -> list[str]:
    """Every n-th name, so that names keep `room` units."""
    every = next((n for n in (1, 2, 4, 5, 8, 10, 16, 20, 32, 64) if n * step >= room), 128)
    texts = []
    for index in range(0, len(names), every):
        x, y = place(step * (index + 0.5))
        texts.append(_text(x, y, names[index], anchor))
    return texts


def _axis(top_value: float) -> list[float]:
    """Round numbers from 0 to at least `top_value`, three to six of them."""
    top_value = top_value if top_value > 0 else 1.0
    power = 10.0 ** np.floor(np.log10(top_value))
    step = next(float(power * n) for n in (0.2, 0.25, 0.5, 1.0, 2.0) if top_value / (power * n) <= 5)
    return [step * n for n in range(int(np.ceil(top_value / step - 1e-9)) + 1)]


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" class="{style}">{escape(text)}</text>'


def _vertical(x: float, y: float, text: str) -> str:
    return f'<text transform="translate({x:g} {y:.2f}) rotate(-90)" text-anchor="middle" class="axis">{escape(text)}</text>'


def _svg(parts: list[str], width: float, height: float, label: str, attributes: str) -> Markup:
    box = f'viewBox="0 0 {width:g} {height:.0f}" style="max-width:{width:g}px"'
    return Markup(f'<svg {attributes} {box} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>')
