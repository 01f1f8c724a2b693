"""Pieces that all plots draw: text, ticks, grids, and the SVG element around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup, escape

LEFT, TOP = 64.0, 8.0
FULL_HEIGHT = 480.0


def text(x: float, y: float, words: str, anchor: str, style: str = "tick") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{escape(words)}</text>'


def vertical(x: float, y: float, words: str) -> str:
    """The name of a vertical axis."""
    place = f"translate({x:g} {y:.1f}) rotate(-90)"
    return f'<text transform="{place}" text-anchor="middle" class="axis">{escape(words)}</text>'


def ticks(
    names: Sequence[str], step: float, room: float, place: Callable[[float], tuple[float, float]], anchor: str
) -> list[str]:
    """Every n-th name, so that names keep `room` units."""
    every = next((n for n in (1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 50, 64, 100, 128) if n * step >= room), 256)
    texts = []
    for index in range(0, len(names), every):
        x, y = place(step * (index + 0.5))
        texts.append(text(x, y, names[index], anchor))
    return texts


def axis(top_value: float) -> list[float]:
    """Round numbers from 0 to at least `top_value`, three to six of them."""
    top_value = top_value if top_value > 0 and np.isfinite(top_value) else 1.0
    power = 10.0 ** np.floor(np.log10(top_value))
    step = next(float(power * n) for n in (0.2, 0.25, 0.5, 1.0, 2.0) if top_value / (power * n) <= 5)
    return [step * n for n in range(int(np.ceil(top_value / step - 1e-9)) + 1)]


def grid(steps: Sequence[float], scale: float, bottom: float, left: float, right: float) -> list[str]:
    """Horizontal lines with their values."""
    return [
        f'<line x1="{left:g}" x2="{right:g}" y1="{bottom - step * scale:.1f}" y2="{bottom - step * scale:.1f}"'
        f' class="grid"/>' + text(left - 8, bottom - step * scale + 4, f"{step:g}", "end")
        for step in steps
    ]


def reference_line(reference: tuple[float, str], y: float, left: float, right: float) -> list[str]:
    """A dashed line and its name above its right end."""
    line = f'<line x1="{left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}" class="reference"/>'
    return [line, text(right - 2, y - 5, reference[1], "end", "halo")]


def svg(parts: list[str], width: float, height: float, label: str, attributes: str) -> Markup:
    """The element: an image with a name for screen readers, as wide as there is room up to its own width."""
    box = f'viewBox="0 0 {width:g} {height:.0f}" style="max-width:{width:g}px"'
    return Markup(f'<svg {attributes} {box} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>')
