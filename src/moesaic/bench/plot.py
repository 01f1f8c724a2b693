"""The plot of results: how far everyone is from the floor, a panel for each case."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesaic.bench.cases import CASES
from moesaic.bench.result import CellResult
from moesaic.files import atomic_file

_COLOURS = {"dense": "#888888", "moesaic": "#00796b", "transformers": "#e08a00", "llama.cpp": "#5e60ce"}
_MARKERS = "osD^vP*X<>"


def draw(results: Sequence[CellResult], path: Path, *, png: bool = True) -> bool:
    """Write the plot as SVG, the same bytes for the same numbers.

    A row is a cell; where it stands is the time of a contender over the floor. Peak memory is not drawn.

    Args:
        results: cells; only those of timed cases with somebody measured are drawn.
        path: of the SVG.
        png: also write a PNG beside it.

    Returns:
        Whether it was written: matplotlib (the `plots` extra) may be missing, or nothing is there to draw.
    """
    drawn = [result for result in results if result.cell.kind.timed and any(row.measured for row in result.rows)]
    if not drawn or importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    cases = [case for case in CASES if any(result.cell.case == case for result in drawn)]
    by_case = {case: [result for result in drawn if result.cell.case == case] for case in cases}
    heights = [len(found) + 1.0 for found in by_case.values()]
    with matplotlib.rc_context({"svg.hashsalt": "moesaic", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(9.0, 0.26 * sum(heights) + 0.5 * len(cases) + 0.9), layout="constrained")
        axes = figure.subplots(len(cases), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        styles = _styles(drawn)
        for axis, (case, found) in zip(axes, by_case.items(), strict=True):
            _panel(axis, case, found, styles)
        axes[-1].set_xlabel("time / floor (logarithmic; 1 is the least that this machine can need)")
        handles: dict[str, Any] = {}
        for axis in axes:
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        ordered = [name for name in styles if name in handles]
        figure.legend([handles[name] for name in ordered], ordered, loc="outside lower center", ncols=4, frameon=False)
        for canvas, kind in ((FigureCanvasSVG, "svg"), (FigureCanvasAgg, "png"))[: 1 + png]:
            canvas(figure)
            with atomic_file(path.with_suffix(f".{kind}")) as temporary:
                metadata = {"Date": None} if kind == "svg" else {"Software": None}
                figure.savefig(temporary, format=kind, metadata=metadata, dpi=150)
    return True


def _styles(results: Sequence[CellResult]) -> dict[str, tuple[str, str]]:
    """Colour by family and marker by number within it, of each contender."""
    styles: dict[str, tuple[str, str]] = {}
    counts: dict[str, int] = {}
    for result in results:
        for row in result.rows:
            if row.measured and row.name not in styles:
                number = counts[row.family] = counts.get(row.family, -1) + 1
                styles[row.name] = _COLOURS[row.family], _MARKERS[number % len(_MARKERS)]
    return styles


def _panel(axis: Any, case: str, results: Sequence[CellResult], styles: dict[str, tuple[str, str]]) -> None:
    for position, result in enumerate(results):
        for row in result.rows:
            if row.measured:
                colour, marker = styles[row.name]
                axis.plot(
                    row.median / result.floor,
                    position,
                    marker,
                    color=colour,
                    markersize=5,
                    fillstyle="full" if row.family == "moesaic" else "none",
                    label=row.name,
                )
    axis.set_xscale("log")
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(results)), [result.cell.label.partition(": ")[2] for result in results])
    axis.set_ylim(len(results) - 0.5, -0.5)
    axis.set_title(case, loc="left", fontweight="bold")
    axis.grid(axis="x", alpha=0.3, which="both")
    axis.spines[["top", "right"]].set_visible(False)
