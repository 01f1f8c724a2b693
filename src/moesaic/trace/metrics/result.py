"""`MetricResult`: what every metric returns, with all that a reader needs to judge the number."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.files import atomic_file


@dataclass(frozen=True)
class Band:
    """Where a value lies when documents are drawn anew.

    Attributes:
        low: lower end.
        high: upper end.
        level: share of the draws between them.
    """

    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True)
class MetricResult:
    """One metric of one layer.

    Attributes:
        metric: its name.
        layer: index of the decoder layer.
        value: the number itself; NaN where it is not defined.
        top_k: K of what was counted: that of the layer, or 1 where only first choices were.
        num_columns: M, experts and null experts.
        reference: what the value would be by chance: a noise floor, a share of random routers, a permutation null;
            None where 0 is the reference.
        values: further numbers of the same metric, by name.
        table: columns of equal length, a row for each group: "label", "count" (n_g), "value" and whatever else belongs
            to it. Undefined entries are NaN, never 0.
        names: names of the groups where they have any, such as domains.
        matrix_GM: a table of groups by columns, for metrics that are one.
        band: by bootstrap over documents; None where there were too few, or for metrics without one.
        min_count: tokens that a group had to have.
        conventions: choices on which publications differ, such as a denominator.
    """

    metric: str
    layer: int
    value: float
    top_k: int
    num_columns: int
    reference: float | None = None
    values: dict[str, float] = field(default_factory=dict)
    table: dict[str, Tensor] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    matrix_GM: Tensor | None = None
    band: Band | None = None
    min_count: int = 1
    conventions: dict[str, str | int | float | bool] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """The table by rows, NaN as None; with "name" where groups have names."""
        columns = {name: [_plain(value) for value in values.tolist()] for name, values in self.table.items()}
        if self.names:
            columns = {"name": list(self.names), **columns}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain dict for JSON; NaN and infinities become None."""
        return {
            "metric": self.metric,
            "layer": self.layer,
            "value": _plain(self.value),
            "top_k": self.top_k,
            "num_columns": self.num_columns,
            "reference": None if self.reference is None else _plain(self.reference),
            "values": {name: _plain(value) for name, value in self.values.items()},
            "band": None if self.band is None else vars(self.band),
            "min_count": self.min_count,
            "conventions": self.conventions,
            "table": self.rows(),
            "matrix": None if self.matrix_GM is None else _nested(self.matrix_GM.tolist()),
        }

    def write(self, path: str | Path) -> None:
        """Write everything as JSON, or the table alone as CSV, by the ending of the name.

        Raises:
            ConfigError: for another ending.
        """
        path = Path(path)
        if path.suffix not in (".json", ".csv"):
            raise ConfigError("path", str(path), "ends in neither .json nor .csv", "choose one of them")
        with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            if path.suffix == ".json":
                json.dump(self.to_dict(), file, indent=1)
            else:
                rows = self.rows()
                writer = csv.DictWriter(file, list(rows[0]) if rows else list(self.table))
                writer.writeheader()
                writer.writerows(rows)


def mean(values: Tensor, weights: Tensor | None = None) -> float:
    """Mean of the values that are not NaN, weighted if asked; NaN if there are none."""
    known = ~values.isnan()
    if not known.any():
        return math.nan
    values = values[known]
    if weights is None:
        return float(values.mean())
    weights = weights[known].to(values.dtype)
    return float((values * weights).sum() / weights.sum())


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nested(values: Any) -> Any:
    return [_nested(value) for value in values] if isinstance(values, list) else _plain(values)
