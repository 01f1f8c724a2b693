"""What a plot shows, apart from how it is drawn: the page draws it as SVG (`svg`), files are drawn by matplotlib (`save`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

WIDTH = 1000.0

Scale = Literal["sequential", "ratio"]


@dataclass(frozen=True)
class HeatMap:
    """A matrix as coloured cells.

    Attributes:
        values_RC: values from 0, float; NaN stays empty.
        row_title: name of the vertical axis.
        column_title: name of the horizontal axis.
        value_title: what a value is, for the legend.
        row_names: R names.
        column_names: C names.
        scale: "sequential" from 0 to `maximum`; "ratio" is logarithmic and neutral at 1, with values of exactly 0 marked.
        maximum: value of the darkest colour of "sequential"; the largest value by default.
        width: of the drawing, in its own units.
    """

    values_RC: np.ndarray
    row_title: str
    column_title: str
    value_title: str
    row_names: Sequence[str]
    column_names: Sequence[str]
    scale: Scale = "sequential"
    maximum: float | None = None
    width: float = WIDTH


@dataclass(frozen=True)
class Bars:
    """Values from 0 as vertical bars.

    Attributes:
        values_C: the values, float; NaN stays empty.
        column_title: name of the horizontal axis.
        value_title: name of the vertical axis.
        names: C names.
        maximum: top of the axis; a little above the largest value by default.
        reference: a value to draw a line at, and its name.
        width: of the drawing, in its own units.
        height: of the plotting area.
    """

    values_C: np.ndarray
    column_title: str
    value_title: str
    names: Sequence[str]
    maximum: float | None = None
    reference: tuple[float, str] | None = None
    width: float = WIDTH
    height: float = 200.0


@dataclass(frozen=True)
class Series:
    """One line; a band of `low` to `high` around it if they are given.

    Attributes:
        name: for the legend.
        x_P: places.
        y_P: values; NaN breaks the line.
        low_P: lower end of the band.
        high_P: upper end of the band.
    """

    name: str
    x_P: np.ndarray
    y_P: np.ndarray
    low_P: np.ndarray | None = None
    high_P: np.ndarray | None = None


@dataclass(frozen=True)
class Lines:
    """Lines over one axis.

    Attributes:
        series: at most eight are told apart.
        x_title: name of the horizontal axis.
        y_title: name of the vertical axis.
        log_x: logarithmic horizontal axis; places below 1 are drawn at its left end.
        maximum: top of the axis; a little above the largest value by default.
        reference: a value to draw a line at, and its name (chance, a noise floor).
        behind: drawn as grey steps on an axis of its own at the right, from 0 (how many a value rests on).
        width: of the drawing, in its own units.
        height: of the plotting area.
    """

    series: Sequence[Series]
    x_title: str
    y_title: str
    log_x: bool = False
    maximum: float | None = None
    reference: tuple[float, str] | None = None
    behind: Series | None = None
    width: float = WIDTH
    height: float = 230.0


@dataclass(frozen=True)
class Radar:
    """Groups over axes around a circle, as in OpenMoE's figures 5 to 10 (arXiv 2402.01739).

    Attributes:
        groups: values by axis, from 0, (C,) each, by name of the group; at most eight are told apart.
        names: C names of the axes.
        value_title: what a value is.
        reference: a value to draw a circle at, and its name.
        width: of the drawing, in its own units.
    """

    groups: Mapping[str, np.ndarray]
    names: Sequence[str]
    value_title: str
    reference: tuple[float, str] | None = None
    width: float = 620.0


@dataclass(frozen=True)
class Panels:
    """Bars of several groups over the same columns, one panel a group, all to one scale.

    Attributes:
        groups: values from 0 by column, float (C,) each, by name of the group.
        column_title: name of the horizontal axis.
        value_title: name of the vertical axes.
        names: C names.
        reference: a value to draw a line at, and its name.
        width: of the drawing, in its own units.
    """

    groups: Mapping[str, np.ndarray]
    column_title: str
    value_title: str
    names: Sequence[str]
    reference: tuple[float, str] | None = None
    width: float = WIDTH


Plot = HeatMap | Bars | Lines | Radar | Panels
