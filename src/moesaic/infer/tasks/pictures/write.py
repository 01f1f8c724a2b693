"""Pictures of a sweep as files."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from moesaic.errors import ConfigError
from moesaic.files import atomic_file, write_text
from moesaic.infer.tasks.pictures.grids import Grid, grids_of
from moesaic.infer.tasks.pictures.plane import draw_plane
from moesaic.infer.tasks.pictures.scatter import draw_scatter
from moesaic.infer.tasks.sweep import Axis, Sweep

FORMATS = (".svg", ".png", ".pdf", ".html")


def draw_sweep(sweep: Sweep, path: str | Path, *, axis: Axis | None = None) -> list[Path]:
    """Draw accuracy against cost, and beside it each grid of two parameters as a heat map.

    Args:
        sweep: with costs.
        path: ends in `.svg`, `.png` or `.pdf`: heat maps are beside it as `NAME-grid.svg`, with numbers from 2 if there are
            several; the same numbers give the same files. Or in `.html`: one page with all pictures and the numbers.
        axis: measure of cost; seconds if they were measured, or else bytes.

    Returns:
        The files.

    Raises:
        ConfigError: for another ending, a sweep whose cost was not measured, or if matplotlib is not installed.
    """
    path = check_picture(path)
    chosen: Axis = axis or sweep.axis
    sweep.points[0].cost_on(chosen)
    planes = [grid for grid in grids_of(sweep.points[1:])[0] if grid.is_plane]
    fills = [(_scatter_size(sweep), lambda figure: draw_scatter(sweep, figure, chosen))]
    fills += [(_plane_size(grid), lambda figure, grid=grid: draw_plane(sweep, grid, figure, chosen)) for grid in planes]
    if path.suffix == ".html":
        drawn = [Markup(_drawn(size, fill, "svg").decode()) for size, fill in fills]
        page = jinja2.Environment(autoescape=True).from_string(_PAGE)
        write_text(path, page.render(pictures=drawn, points=sweep.by_cost(chosen), axis=chosen, sweep=sweep))
        return [path]
    written = []
    for number, (size, fill) in enumerate(fills):
        name = path.stem + ("-grid" if number else "") + (str(number) if number > 1 else "")
        with atomic_file(path.with_name(name + path.suffix)) as temporary:
            temporary.write_bytes(_drawn(size, fill, path.suffix[1:]))
        written.append(path.with_name(name + path.suffix))
    return written


def check_picture(path: str | Path) -> Path:
    """The path, if a picture can be written there.

    Raises:
        ConfigError: for an ending that is unknown, or if matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError("picture", str(path), "has no known ending", f"end it in one of {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "picture", str(path), "needs matplotlib, which is not installed", "pip install 'moesaic[plots]'"
        ) from None
    return path


def _drawn(size: tuple[float, float], fill: Callable[[Any], None], kind: str) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "moesaic", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure)
        file = io.BytesIO()
        figure.savefig(
            file, format=kind, dpi=150, metadata={"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        )
    return file.getvalue()


def _scatter_size(sweep: Sweep) -> tuple[float, float]:
    grids, alone = grids_of(sweep.points[1:])
    rows = (2 + len(alone) + sum(len(grid.lines) for grid in grids) + 1) // 2
    return 7.5, 4.4 + 0.19 * rows


def _plane_size(grid: Grid) -> tuple[float, float]:
    columns = max(len(line.points) for line in grid.lines)
    return max(5.5, 2.0 + 0.95 * columns), 1.5 + 0.55 * len(grid.lines)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Accuracy against cost</title>
<style>
body {font: 15px/1.5 system-ui, sans-serif; color: #1b2330; max-width: 62rem; margin: 2rem auto; padding: 0 1rem}
svg {max-width: 100%; height: auto} table {border-collapse: collapse; font-variant-numeric: tabular-nums}
th, td {padding: .25rem .7rem; border-bottom: 1px solid #d5dbe3; text-align: right} th:first-child, td:first-child {text-align: left}
.front {font-weight: 600}
</style>
<h1>Accuracy against cost</h1>
{% for picture in pictures %}{{ picture }}{% endfor %}
<table><tr><th>decoding<th>right, %<th>95 % interval<th>seconds<th>bytes<th>positions<th>gained<th>lost<th>p</tr>
{% set front = sweep.front(axis) %}
{%- for point in points %}<tr{% if point in front %} class="front"{% endif %}><td>{{ point.label }}
<td>{{ "%.1f" % (100 * point.accuracy.value) }}
<td>{{ "%.1f to %.1f" % (100 * point.accuracy.low, 100 * point.accuracy.high) }}
<td>{{ "-" if point.cost.time_ratio is none else "%.2f" % point.cost.time_ratio }}
<td>{{ "%.2f" % point.cost.bytes_ratio }}<td>{{ "%.2f" % point.cost.positions }}
{% if point.compared is none %}<td>-<td>-<td>-{% else %}<td>{{ point.compared.gained }}<td>{{ point.compared.lost }}
<td>{{ "%.3g" % point.compared.p_value }}{% endif %}</tr>
{% endfor %}</table>
<p>Seconds and bytes are multiples of those of {{ sweep.points[0].label }}, with which all decodings are compared item by item.
Bold ones are on the Pareto front: none is both as cheap and as accurate, and better in one of the two.</p>
</html>
"""
