"""The memory of layouts as stacked bars."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from moesaic.dist.plan.planner import Plan
from moesaic.errors import ConfigError
from moesaic.files import atomic_file

_PARTS = {
    "parameters": "#00796b",
    "optimizer": "#4db6ac",
    "gradients": "#e08a00",
    "activations": "#5e60ce",
    "buffers": "#9e9e9e",
    "workspace": "#cfcfcf",
}


def draw_memory(plan: Plan, path: Path, *, top: int = 10) -> None:
    """Write a bar for each of the first layouts, with a mark at its peak and a line at what is usable.

    Args:
        plan: what to draw.
        path: file to write, `.svg` or `.png`.
        top: how many layouts.

    Raises:
        ConfigError: for another kind of file, or without matplotlib (the `plots` extra).
    """
    kind = path.suffix.lstrip(".")
    if kind not in ("svg", "png"):
        raise ConfigError("--plot", str(path), "is neither .svg nor .png", "give a file name that ends so")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot", str(path), "needs matplotlib", "pip install 'moesaic[plots]'")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    shown = plan.candidates[:top]
    places = list(range(len(shown)))
    with matplotlib.rc_context({"svg.hashsalt": "moesaic", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(8.0, 0.32 * len(shown) + 1.4), layout="constrained")
        axis = figure.subplots()
        left = [0.0] * len(shown)
        for part, colour in _PARTS.items():
            widths = [getattr(candidate.memory, part) / 1e9 for candidate in shown]
            axis.barh(places, widths, left=left, color=colour, label=part, height=0.7)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        peaks = [candidate.memory.peak / 1e9 for candidate in shown]
        axis.plot(peaks, places, "k|", markersize=14, markeredgewidth=1.5, label="peak")
        usable = plan.cluster.memory * (1 - plan.cluster.headroom) / 1e9
        axis.axvline(usable, color="#b00020", linewidth=1, label="usable")
        names = [
            f"{layout.dp_replicate}x{layout.dp_shard} ep {layout.ep} esp {layout.esp}"
            for layout in (candidate.layout for candidate in shown)
        ]
        axis.set_yticks(places, names)
        axis.invert_yaxis()
        axis.set_xlabel("GB on a rank; parts are not all alive at once, the mark is the most that is")
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=8, frameon=False)
        {"svg": FigureCanvasSVG, "png": FigureCanvasAgg}[kind](figure)
        with atomic_file(path) as temporary:
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            figure.savefig(temporary, format=kind, metadata=metadata, dpi=150)
