"""Two files of results side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesaic.bench.cases import Cell
from moesaic.bench.store import Saved


@dataclass(frozen=True)
class Change:
    """One contender in one cell that both files have.

    Attributes:
        cell: where.
        name: of the contender.
        before: its earlier median.
        after: its median now.
    """

    cell: Cell
    name: str
    before: float
    after: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with the ratio."""
        return {
            "cell": self.cell.to_dict(),
            "name": self.name,
            "before": self.before,
            "after": self.after,
            "ratio": self.ratio,
        }

    @property
    def ratio(self) -> float:
        """After over before; below 1 is faster."""
        return self.after / self.before


def changes(before: Saved, after: Saved) -> list[Change]:
    """All that both measured, in the order of `after`."""
    found = []
    for cell, result in after.results.items():
        earlier = before.results.get(cell)
        for row in result.rows if earlier is not None else ():
            other = earlier.measured(row.name) if earlier is not None else None
            if other is not None and row.measured and other.median > 0:
                found.append(Change(cell, row.name, other.median, row.median))
    return found
