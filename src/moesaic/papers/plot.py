"""The plot of a reproduction: validation loss over tokens, and what the experiment draws beside it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from moesaic.files import atomic_file
from moesaic.papers.reproduce import Reproduction


def draw(found: Reproduction, path: Path) -> bool:
    """Write the plot as SVG, the same bytes for the same numbers.

    Returns:
        Whether it was written; matplotlib (the `plots` extra) may be missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    panels = 1 if found.experiment.panel is None else 2
    with matplotlib.rc_context({"svg.hashsalt": "moesaic"}):
        figure = Figure(figsize=(4.8 * panels, 3.8), layout="constrained")
        FigureCanvasSVG(figure)
        axes = np.atleast_1d(np.asarray(figure.subplots(1, panels), dtype=object))
        _curves(axes[0], found)
        if found.experiment.panel is not None:
            found.experiment.panel(axes[1], found.measured)
        for axis in axes:
            axis.grid(alpha=0.3)
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
