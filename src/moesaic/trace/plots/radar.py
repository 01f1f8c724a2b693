"""Radar charts as SVG."""

from __future__ import annotations

import math

import numpy as np
from markupsafe import Markup

from moesaic.trace.plots import marks
from moesaic.trace.plots.colours import CATEGORIES, DASHES
from moesaic.trace.plots.specs import Radar


def radar_chart(plot: Radar, label: str) -> Markup:
    """The plot: axes clockwise from the top, legend at the right."""
    legend = 30.0 + 7.0 * max((len(name) for name in plot.groups), default=0) + 30
    radius = (plot.width - legend - 60) / 2
    centre_x, centre_y = radius + 30, radius + 26
    largest = max((float(np.nanmax(values, initial=0.0)) for values in plot.groups.values()), default=0.0)
    steps = marks.axis(largest)
    scale = radius / steps[-1]
    count = len(plot.names)
    angles = [2 * math.pi * index / max(count, 1) for index in range(count)]

    def point(angle: float, length: float) -> str:
        return f"{centre_x + math.sin(angle) * length:.1f} {centre_y - math.cos(angle) * length:.1f}"

    parts = [f'<circle cx="{centre_x:g}" cy="{centre_y:g}" r="{step * scale:.1f}" class="ring"/>' for step in steps[1:]]
    parts.append(
        f'<path class="grid" d="{"".join(f"M{centre_x:g} {centre_y:g}L{point(a, radius)}" for a in angles)}"/>'
    )
    if plot.reference is not None:
        parts.append(
            f'<circle cx="{centre_x:g}" cy="{centre_y:g}" r="{plot.reference[0] * scale:.1f}" class="reference"/>'
        )
    for number, values in enumerate(plot.groups.values()):
        corners = "L".join(point(a, v * scale) for a, v in zip(angles, np.nan_to_num(values).tolist(), strict=True))
        style = f' stroke-dasharray="{DASHES[number % len(DASHES)]}"' if DASHES[number % len(DASHES)] else ""
        parts.append(f'<path class="line" stroke="{CATEGORIES[number % len(CATEGORIES)]}"{style} d="M{corners}z"/>')
    parts += [marks.text(centre_x + 3, centre_y - step * scale - 2, f"{step:g}", "start") for step in steps[1:]]
    every = max(1, math.ceil(count / 40))
    for index in range(0, count, every):
        x, y = (
            centre_x + math.sin(angles[index]) * (radius + 14),
            centre_y - math.cos(angles[index]) * (radius + 14) + 4,
        )
        parts.append(marks.text(x, y, plot.names[index], "middle"))
    parts += _legend(plot, 2 * radius + 66, 30)
    return marks.svg(parts, plot.width, 2 * radius + 60, label, 'class="radar"')


def _legend(plot: Radar, x: float, y: float) -> list[str]:
    parts = []
    for number, name in enumerate(plot.groups):
        colour, dash = CATEGORIES[number % len(CATEGORIES)], DASHES[number % len(DASHES)]
        style = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<path class="line" stroke="{colour}"{style} d="M{x:.1f} {y:g}h24"/>')
        parts.append(marks.text(x + 30, y + 4, name, "start"))
        y += 20
    if plot.reference is not None:
        parts.append(f'<line x1="{x:.1f}" x2="{x + 24:.1f}" y1="{y:g}" y2="{y:g}" class="reference"/>')
        parts.append(marks.text(x + 30, y + 4, plot.reference[1], "start"))
    return parts
