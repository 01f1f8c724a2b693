"""Plots as files, drawn by matplotlib, the extra `plots`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moesaic.errors import ConfigError
from moesaic.files import atomic_file
from moesaic.trace.plots.colours import CATEGORIES, LEVELS
from moesaic.trace.plots.heatmap import levels, maximum_of, palette, ratio_reach
from moesaic.trace.plots.specs import Bars, HeatMap, Lines, Panels, Plot, Radar

_STYLES = ("-", "--", ":", "-.")
_BAR, _REFERENCE, _GRID = "#2171b5", "#a33a06", "#d5dbe3"


def save(
    plot: Plot, title: str, folder: str | Path, name: str, formats: tuple[str, ...] = ("png", "svg")
) -> list[Path]:
    """Write a plot as `folder/name.FORMAT`, each file as a whole or not at all.

    Args:
        plot: what to draw.
        title: stands above it.
        folder: made if it is not there.
        name: of the files, without ending.
        formats: that matplotlib writes: "png", "svg", "pdf".

    Raises:
        ConfigError: if matplotlib is not installed.
        OSError: if a file can't be written.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "matplotlib", None, "is not installed, and plots as files need it", "pip install 'moesaic[plots]'"
        ) from None
    # Text of files stays text, and the same plot gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        figure = Figure(figsize=(plot.width / 100, _height(plot)), layout="constrained")
        FigureCanvasAgg(figure)
        _draw(plot, figure)
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        written = []
        for form in formats:
            path = Path(folder) / f"{name}.{form}"
            with atomic_file(path) as temporary:
                figure.savefig(temporary, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
            written.append(path)
    return written


def _height(plot: Plot) -> float:
    if isinstance(plot, HeatMap):
        rows, columns = plot.values_RC.shape
        return float(np.clip(rows * min(plot.width / 100 / columns, 0.3) + 1.8, 2.4, 8.0))
    if isinstance(plot, Panels):
        return 1.2 + 1.1 * len(plot.groups)
    return plot.width / 100 if isinstance(plot, Radar) else plot.height / 100 + 1.4


def _draw(plot: Plot, figure: Any) -> None:
    match plot:
        case HeatMap():
            _heat_map(plot, figure)
        case Bars():
            axes = figure.subplots()
            _bars(axes, plot.values_C, plot.names, plot.reference)
            axes.set(xlabel=plot.column_title, ylabel=plot.value_title, ylim=(0, plot.maximum))
        case Panels():
            panels = np.atleast_1d(figure.subplots(len(plot.groups), 1, sharex=True, sharey=True))
            for axes, (name, values_C) in zip(panels, plot.groups.items(), strict=True):
                _bars(axes, values_C, plot.names, plot.reference)
                axes.set_title(name, fontsize=9, loc="left")
            panels[-1].set_xlabel(plot.column_title)
            figure.supylabel(plot.value_title, fontsize=9)
        case Lines():
            _lines(plot, figure)
        case Radar():
            _radar(plot, figure)


def _names(axis: Any, names: Any) -> None:
    step = max(1, -(-len(names) // 32))
    axis.set_ticks(np.arange(0, len(names), step), [names[index] for index in range(0, len(names), step)])


def _bars(axes: Any, values_C: np.ndarray, names: Any, reference: tuple[float, str] | None) -> None:
    axes.bar(np.arange(len(values_C)), values_C, color=_BAR, width=0.78)
    if reference is not None:
        axes.axhline(reference[0], color=_REFERENCE, linestyle="--", linewidth=1.2, label=reference[1])
        axes.legend(frameon=False, loc="upper right")
    _names(axes.xaxis, names)
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _heat_map(plot: HeatMap, figure: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm, Normalize

    axes = figure.subplots()
    colours = palette(plot)
    axes.imshow(colours[levels(plot)], aspect="auto", interpolation="nearest")
    axes.set(xlabel=plot.column_title, ylabel=plot.row_title)
    _names(axes.xaxis, plot.column_names)
    _names(axes.yaxis, plot.row_names)
    if plot.scale == "ratio":
        reach = ratio_reach(plot)
        norm = LogNorm(2.0**-reach, 2.0**reach)
    else:
        norm = Normalize(0, maximum_of(plot))
    bar = figure.colorbar(
        ScalarMappable(norm, ListedColormap(colours[:LEVELS] / 255)), ax=axes, label=plot.value_title, fraction=0.03
    )
    if plot.scale == "ratio":
        ends = range(-ratio_reach(plot), ratio_reach(plot) + 1)
        bar.set_ticks([2.0**power for power in ends], labels=[f"{2.0**power:g}" for power in ends])
        bar.minorticks_off()


def _lines(plot: Lines, figure: Any) -> None:
    axes = figure.subplots()
    if plot.behind is not None:
        counts = axes.twinx()
        counts.fill_between(plot.behind.x_P, plot.behind.y_P, color="#e9edf2", step="mid")
        counts.set_ylabel(plot.behind.name)
        counts.set_ylim(bottom=0)
        axes.set_zorder(counts.get_zorder() + 1)
        axes.patch.set_visible(False)
    for number, series in enumerate(plot.series):
        colour = CATEGORIES[number % len(CATEGORIES)]
        x_P = np.maximum(series.x_P, 1) if plot.log_x else series.x_P
        marker = "o" if len(x_P) <= 40 else None
        style = _STYLES[number % len(_STYLES)]
        axes.plot(x_P, series.y_P, style, color=colour, label=series.name, marker=marker, markersize=3.5)
        if series.low_P is not None and series.high_P is not None:
            axes.fill_between(x_P, series.low_P, series.high_P, color=colour, alpha=0.16, linewidth=0)
    if plot.reference is not None:
        axes.axhline(plot.reference[0], color=_REFERENCE, linestyle="--", linewidth=1.2, label=plot.reference[1])
    if plot.log_x:
        axes.set_xscale("log")
    axes.set(xlabel=plot.x_title, ylabel=plot.y_title, ylim=(0, plot.maximum))
    axes.grid(color=_GRID, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    if len(plot.series) > 1 or plot.reference is not None:
        axes.legend(frameon=False)


def _radar(plot: Radar, figure: Any) -> None:
    axes = figure.subplots(subplot_kw={"projection": "polar"})
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    angles = np.linspace(0, 2 * np.pi, len(plot.names), endpoint=False)
    closed = np.append(angles, angles[:1])
    for number, (name, values_C) in enumerate(plot.groups.items()):
        style, colour = _STYLES[number % len(_STYLES)], CATEGORIES[number % len(CATEGORIES)]
        axes.plot(closed, np.append(values_C, values_C[:1]), style, color=colour, label=name)
    if plot.reference is not None:
        axes.plot(closed, np.full(len(closed), plot.reference[0]), "--", color=_REFERENCE, label=plot.reference[1])
    axes.set_xticks(angles, plot.names)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1.0))
