"""What a report is made of: sections of figures, each with the table behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from moesaic.trace.plots import Plot

SHOWN_CELLS = 2_400
SHOWN_ROWS = 64
SHOWN_COLUMNS = 66
DIGITS = 6
HALF = 520.0


@dataclass(frozen=True)
class Chip:
    """One token in a cell: its text, a number beside it, and what hovering says."""

    text: str
    number: str
    title: str


Cell = int | float | str | None | Sequence[Chip]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: its head.
        form: format of its numbers on the page; files hold six digits.
        text: left-aligned.
    """

    name: str
    form: str = ""
    text: bool = False

    def show(self, cell: Cell) -> str:
        """A number or text as the page shows it."""
        if cell is None or (isinstance(cell, float) and math.isnan(cell)):
            return "–"
        if isinstance(cell, str):
            return cell
        if isinstance(cell, int | float):
            return format(cell, self.form or ("," if isinstance(cell, int) else ".4g"))
        return "  ".join(f"{chip.text} {chip.number}" for chip in cell)


@dataclass(frozen=True)
class Table:
    """Numbers with names. Large tables are shown in part; their files are complete.

    Attributes:
        caption: what it holds.
        columns: heads; the first column names the rows.
        rows: a cell for each column.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    @property
    def shown_columns(self) -> Sequence[Column]:
        """Columns on the page."""
        return self.columns[:SHOWN_COLUMNS]

    @property
    def shown(self) -> Sequence[Sequence[Cell]]:
        """Rows on the page, without the columns that are left out."""
        count = min(max(SHOWN_CELLS // max(len(self.shown_columns), 1), 12), SHOWN_ROWS)
        return [row[:SHOWN_COLUMNS] for row in self.rows[:count]]

    @property
    def left_out(self) -> str:
        """Says what the page leaves out; empty if nothing."""
        rows, columns = len(self.shown), len(self.shown_columns)
        parts = []
        if rows < len(self.rows):
            parts.append(f"{rows:,} of {len(self.rows):,} rows")
        if columns < len(self.columns):
            parts.append(f"{columns:,} of {len(self.columns):,} columns")
        return f"Shown: {' and '.join(parts)}. The CSV file has all." if parts else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict."""
        return {
            "caption": self.caption,
            "columns": [column.name for column in self.columns],
            "rows": [[plain(cell) for cell in row] for row in self.rows],
        }


def matrix(caption: str, corner: str, row_names: Sequence[str], column_names: Sequence[str], values_RC: Any) -> Table:
    """A matrix as a table with a column for each of its own."""
    columns = [Column(corner, text=True), *(Column(name, ".3f") for name in column_names)]
    rows = [[name, *values] for name, values in zip(row_names, np.asarray(values_RC).tolist(), strict=True)]
    return Table(caption, columns, rows)


def plain(cell: Cell) -> Any:
    """A cell as JSON has it: six digits, None for what is not a number, tokens as text."""
    if isinstance(cell, float):
        return float(f"{cell:.{DIGITS}g}") if math.isfinite(cell) else None
    if cell is None or isinstance(cell, int | str):
        return cell
    return "; ".join(f"{chip.text} {chip.number}" for chip in cell)


@dataclass(frozen=True)
class Figure:
    """A plot, how to read it, and its table.

    Attributes:
        name: names its files; unique in a report.
        title: heading.
        how: how to read it.
        table: the numbers behind it.
        plot: None where the table is the figure.
        layer: the layer it is of; such figures are shown for one layer at a time.
        opened: show the table at once.
    """

    name: str
    title: str
    how: str
    table: Table
    plot: Plot | None = None
    layer: int | None = None
    opened: bool = False

    @property
    def half(self) -> bool:
        """Whether two of its size stand beside each other."""
        return self.plot is not None and self.plot.width <= HALF

    @property
    def label(self) -> str:
        """Name of the plot for screen readers."""
        return self.title if self.layer is None else f"{self.title}, layer {self.layer}"


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        name: its anchor.
        title: heading.
        intro: what it answers.
        figures: what it shows.
        notes: what does not hold, is left out, or must be kept in mind.
        own: HTML of a section that is more than figures, shown between introduction and figures.
    """

    name: str
    title: str
    intro: str = ""
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    own: Markup = field(default=Markup(""), repr=False)

    @property
    def layers(self) -> list[int]:
        """Layers that some figure is of."""
        return sorted({figure.layer for figure in self.figures if figure.layer is not None})

    @property
    def first_of_layers(self) -> str:
        """Name of the figure before which the layer is chosen; empty if there is no choice."""
        if len(self.layers) < 2:
            return ""
        return next(figure.name for figure in self.figures if figure.layer is not None)


@dataclass(frozen=True)
class Tile:
    """A number at the head of the page."""

    value: str
    words: str
