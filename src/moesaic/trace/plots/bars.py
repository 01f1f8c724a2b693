"""Bars as SVG, all of them in one path."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from moesaic.trace.plots import marks
from moesaic.trace.plots.specs import Bars, Panels

_PANEL, _BETWEEN = 72.0, 24.0


def bar_chart(plot: Bars, label: str) -> Markup:
    """The plot."""
    values_C = np.nan_to_num(plot.values_C, nan=0.0)
    above = max(float(values_C.max(initial=0.0)), plot.reference[0] if plot.reference else 0.0)
    steps = marks.axis(plot.maximum if plot.maximum is not None else above * 1.05)
    scale = plot.height / steps[-1]
    slot = (plot.width - marks.LEFT - 8) / max(len(values_C), 1)
    bar = min(slot * 0.78, 44.0)
    bottom, right = marks.TOP + plot.height, plot.width - 8
    parts = marks.grid(steps, scale, bottom, marks.LEFT, right)
    parts.append(_bars(values_C, slot, bar, bottom, scale))
    if plot.reference is not None:
        parts += marks.reference_line(plot.reference, bottom - plot.reference[0] * scale, marks.LEFT, right)
    parts += marks.ticks(plot.names, slot, 30.0, lambda at: (marks.LEFT + at, bottom + 16), "middle")
    parts.append(marks.text((marks.LEFT + plot.width) / 2, bottom + 34, plot.column_title, "middle", "axis"))
    parts.append(marks.vertical(14, (marks.TOP + bottom) / 2, plot.value_title))
    place = f'data-x="{marks.LEFT:g}" data-y="{marks.TOP:g}" data-w="{slot:.5g}" data-h="{plot.height:g}"'
    return marks.svg(parts, plot.width, bottom + 42, label, f'class="bars" {place} data-columns="{len(values_C)}"')


def panel_chart(plot: Panels, label: str) -> Markup:
    """The plot: a strip for each group, its name above."""
    groups = {name: np.nan_to_num(values_C) for name, values_C in plot.groups.items()}
    largest = max((float(values_C.max(initial=0.0)) for values_C in groups.values()), default=0.0)
    steps = marks.axis(max(largest, plot.reference[0] if plot.reference else 0.0))
    steps, scale = [0.0, steps[-1] / 2, steps[-1]], _PANEL / steps[-1]
    slot, right = (plot.width - marks.LEFT - 8) / max(len(plot.names), 1), plot.width - 8
    bar = min(slot * 0.78, 44.0)
    parts: list[str] = []
    bottom = marks.TOP
    for number, (name, values_C) in enumerate(groups.items()):
        bottom += _PANEL + _BETWEEN
        parts += marks.grid(steps, scale, bottom, marks.LEFT, right)
        parts.append(_bars(values_C, slot, bar, bottom, scale))
        parts.append(marks.text(marks.LEFT, bottom - _PANEL - 6, name, "start", "axis"))
        if plot.reference is not None:
            parts += marks.reference_line(
                (plot.reference[0], ""), bottom - plot.reference[0] * scale, marks.LEFT, right
            )
            if not number:  # named once, beside the name of the first group
                parts.append(marks.text(right, bottom - _PANEL - 6, f"- - {plot.reference[1]}", "end", "halo"))
    parts += marks.ticks(plot.names, slot, 30.0, lambda at: (marks.LEFT + at, bottom + 16), "middle")
    parts.append(marks.text((marks.LEFT + plot.width) / 2, bottom + 34, plot.column_title, "middle", "axis"))
    parts.append(marks.vertical(14, (marks.TOP + bottom) / 2, plot.value_title))
    return marks.svg(parts, plot.width, bottom + 42, label, 'class="panels"')


def _bars(values_C: np.ndarray, slot: float, bar: float, bottom: float, scale: float) -> str:
    drawn = "".join(
        f"M{marks.LEFT + slot * (index + 0.5) - bar / 2:.2f} {bottom:g}v{-value * scale:.2f}h{bar:.2f}V{bottom:g}z"
        for index, value in enumerate(values_C.tolist())
    )
    return f'<path class="bar" d="{drawn}"/>'
