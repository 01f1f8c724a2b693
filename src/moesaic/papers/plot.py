"""The plot of a reproduction: validation loss over tokens, and what the experiment draws beside it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.files import atomic_file
from moesaic.papers.experiment import Section
from moesaic.papers.reproduce import Reproduction


def draw(found: Reproduction, path: Path) -> bool:
    """Write the plot as SVG, the same bytes for the same numbers.

    Returns:
        Whether it was written; matplotlib (the `plots` extra) may be missing.
    """
    trained = any(result.curve for arms in found.results.values() for result in arms.values())
    panels = trained + (found.experiment.panel is not None)
    if not panels:
        return False

    def fill(figure: Any) -> None:
        axes = np.atleast_1d(np.asarray(figure.subplots(1, panels), dtype=object))
        if trained:
            _curves(axes[0], found)
        if found.experiment.panel is not None:
            found.experiment.panel(axes[-1], found.measured)
        for axis in axes:
            axis.grid(alpha=0.3)

    return _write(path, (4.8 * panels, 3.8), fill)


def draw_section(section: Section, found: Reproduction, path: Path) -> bool:
    """Write the figure of a part of the page, if it has one, as `draw` does."""
    if section.draw is None:
        return False
    fill = section.draw
    return _write(path, section.size, lambda figure: fill(figure, found))


def _write(path: Path, size: tuple[float, float], fill: Callable[[Any], None]) -> bool:
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "moesaic"}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        fill(figure)
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
    return True


def _curves(axes, found: Reproduction) -> None:
    """Mean over seeds of each arm's curve, its range shaded."""
    for name in found.arms:
        curves = [found.results[seed][name].curve for seed in found.seeds]
        if not found.experiment.arms[name].compared or not all(curves):
            continue
        tokens = [count / 1e3 for count, _ in curves[0]]
        losses = np.array([[loss for _, loss in curve] for curve in curves])
        [line] = axes.plot(tokens, losses.mean(0), label=name, marker=".", linewidth=1.2)
        axes.fill_between(tokens, losses.min(0), losses.max(0), alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel="thousand tokens", ylabel="validation loss (nats)", title="Validation loss")
    axes.legend(frameon=False, fontsize=8)
