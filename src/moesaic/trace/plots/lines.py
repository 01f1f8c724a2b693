"""Lines as SVG."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup, escape

from moesaic.trace.plots import marks
from moesaic.trace.plots.colours import CATEGORIES, DASHES
from moesaic.trace.plots.specs import Lines, Series

_LEGEND = 22.0
_MARKERS = 40


def line_chart(plot: Lines, label: str) -> Markup:
    """The plot, with its legend above."""
    top = marks.TOP + _LEGEND * _legend_rows(plot)
    bottom, right = top + plot.height, plot.width - (64.0 if plot.behind else 10.0)
    largest = max((_largest(series) for series in plot.series), default=0.0)
    above = max(largest, plot.reference[0] if plot.reference else 0.0)
    steps = marks.axis(plot.maximum if plot.maximum is not None else above * 1.05)
    scale = plot.height / steps[-1]
    x_ticks, to_x = horizontal(plot, marks.LEFT, right)
    parts: list[str] = []
    if plot.behind is not None:
        parts += _behind(plot.behind, to_x, top, bottom, right)
    parts += marks.grid(steps, scale, bottom, marks.LEFT, right)
    for number, series in enumerate(plot.series):
        parts += _line(series, number, to_x(series.x_P), bottom, scale)
    if plot.reference is not None:
        parts += marks.reference_line(plot.reference, bottom - plot.reference[0] * scale, marks.LEFT, right)
    starts_at_0 = plot.log_x and any((series.x_P < 1).any() for series in plot.series)
    for x in x_ticks:
        words = "0" if starts_at_0 and x == 1 else f"{x:,g}"
        parts.append(marks.text(float(to_x(np.array([x]))[0]), bottom + 16, words, "middle"))
    parts.append(marks.text((marks.LEFT + right) / 2, bottom + 34, plot.x_title, "middle", "axis"))
    parts.append(marks.vertical(14, (top + bottom) / 2, plot.y_title))
    parts += _legend(plot)
    return marks.svg(parts, plot.width, bottom + 42, label, 'class="lines"')


def horizontal(plot: Lines, left: float, right: float):
    """Ticks of the horizontal axis, and the function from places to drawing units."""
    everything = [series.x_P for series in (*plot.series, *([plot.behind] if plot.behind else [])) if len(series.x_P)]
    x_P = np.concatenate(everything) if everything else np.array([0.0, 1.0])
    if plot.log_x:
        low, high = np.log10(max(float(x_P.min()), 1.0)), np.log10(max(float(x_P.max()), 10.0))
        high = max(high, low + 0.1)
        shown = [10.0**n for n in range(int(np.floor(low)), int(np.ceil(high)) + 1)]
        shown = [x for x in shown if low - 1e-9 <= np.log10(x) <= high + 1e-9] or [10.0**low, 10.0**high]
        return shown, lambda x: left + (np.log10(np.maximum(x, 1.0)) - low) / (high - low) * (right - left)
    low, high = float(x_P.min()), max(float(x_P.max()), float(x_P.min()) + 1e-9)
    shown = [x for x in marks.axis(high) if low <= x <= high]
    return shown, lambda x: left + (x - low) / (high - low) * (right - left)


def _largest(series: Series) -> float:
    values = [series.y_P] if series.high_P is None else [series.y_P, series.high_P]
    finite = np.concatenate(values)
    finite = finite[np.isfinite(finite)]
    return float(finite.max(initial=0.0))


def _line(series: Series, number: int, x_P: np.ndarray, bottom: float, scale: float) -> list[str]:
    colour, dash = CATEGORIES[number % len(CATEGORIES)], DASHES[number % len(DASHES)]
    parts = []
    if series.low_P is not None and series.high_P is not None:
        known = np.isfinite(series.low_P) & np.isfinite(series.high_P)
        upper = [f"{x:.1f} {bottom - y * scale:.1f}" for x, y in zip(x_P[known], series.high_P[known], strict=True)]
        lower = [f"{x:.1f} {bottom - y * scale:.1f}" for x, y in zip(x_P[known], series.low_P[known], strict=True)]
        if upper:
            parts.append(f'<path class="band" fill="{colour}" d="M{"L".join(upper + lower[::-1])}z"/>')
    drawn, pen = "", "M"
    for x, y in zip(x_P.tolist(), series.y_P.tolist(), strict=True):
        if np.isfinite(y):
            drawn += f"{pen}{x:.1f} {bottom - y * scale:.1f}"
        pen = "L" if np.isfinite(y) else "M"
    style = f' stroke-dasharray="{dash}"' if dash else ""
    parts.append(f'<path class="line" stroke="{colour}"{style} d="{drawn}"/>')
    if len(x_P) <= _MARKERS:
        parts += [
            f'<circle cx="{x:.1f}" cy="{bottom - y * scale:.1f}" r="3" fill="{colour}"/>'
            for x, y in zip(x_P.tolist(), series.y_P.tolist(), strict=True)
            if np.isfinite(y)
        ]
    return parts


def _behind(series: Series, to_x, top: float, bottom: float, right: float) -> list[str]:
    """Grey steps on their own axis at the right."""
    steps = marks.axis(float(np.nanmax(series.y_P, initial=0.0)) * 1.05)
    scale = (bottom - top) / steps[-1]
    x_P = to_x(series.x_P)
    y_P = bottom - np.nan_to_num(series.y_P) * scale
    drawn = f"M{x_P[0]:.1f} {bottom:.1f}" + "".join(f"L{x:.1f} {y:.1f}" for x, y in zip(x_P, y_P, strict=True))
    parts = [f'<path class="behind" d="{drawn}L{x_P[-1]:.1f} {bottom:.1f}z"/>']
    parts += [marks.text(right + 8, bottom - step * scale + 4, f"{step:g}", "start", "tick") for step in steps]
    parts.append(
        f'<text transform="translate({right + 54:g} {(top + bottom) / 2:.1f}) rotate(90)" text-anchor="middle"'
        f' class="tick">{escape(series.name)}</text>'
    )
    return parts


def _places(plot: Lines) -> list[tuple[float, int]]:
    """Where the entries of the legend stand: x, and number of the row."""
    x, row, places = marks.LEFT, 0, []
    for series in plot.series:
        length = 44.0 + 6.6 * len(series.name)
        if x + length > plot.width and x > marks.LEFT:
            x, row = marks.LEFT, row + 1
        places.append((x, row))
        x += length
    return places


def _legend_rows(plot: Lines) -> int:
    return 0 if len(plot.series) < 2 else _places(plot)[-1][1] + 1


def _legend(plot: Lines) -> list[str]:
    if len(plot.series) < 2:
        return []
    parts = []
    for number, (series, (x, row)) in enumerate(zip(plot.series, _places(plot), strict=True)):
        colour, dash = CATEGORIES[number % len(CATEGORIES)], DASHES[number % len(DASHES)]
        style = f' stroke-dasharray="{dash}"' if dash else ""
        y = marks.TOP + 6 + row * _LEGEND
        parts.append(f'<path class="line" stroke="{colour}"{style} d="M{x:.1f} {y:g}h24"/>')
        parts.append(marks.text(x + 30, y + 4, series.name, "start"))
    return parts
