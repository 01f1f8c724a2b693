"""Plots: what they show (`HeatMap`, `Bars`, `Lines`, `Radar`, `Panels`), drawn for a page (`svg`) or into files (`save`)."""

from __future__ import annotations

from markupsafe import Markup

from moesaic.trace.plots.bars import bar_chart, panel_chart
from moesaic.trace.plots.files import save
from moesaic.trace.plots.heatmap import heat_map
from moesaic.trace.plots.lines import line_chart
from moesaic.trace.plots.radar import radar_chart
from moesaic.trace.plots.specs import Bars, HeatMap, Lines, Panels, Plot, Radar, Series


def svg(plot: Plot, label: str) -> Markup:
    """Inline SVG: it needs no library, stays sharp in print, and takes the page's colours through CSS classes.

    Args:
        plot: what to draw.
        label: what a screen reader says.
    """
    match plot:
        case HeatMap():
            return heat_map(plot, label)
        case Bars():
            return bar_chart(plot, label)
        case Lines():
            return line_chart(plot, label)
        case Radar():
            return radar_chart(plot, label)
        case Panels():
            return panel_chart(plot, label)


__all__ = ["Bars", "HeatMap", "Lines", "Panels", "Plot", "Radar", "Series", "save", "svg"]
