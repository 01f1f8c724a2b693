"""The page of results: a summary of each case, all contenders below it, and what everything was measured with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moesaic.bench import table as tables
from moesaic.bench.cases import CASES, Case
from moesaic.bench.result import CellResult, Row
from moesaic.bench.store import Saved


@dataclass(frozen=True)
class Files:
    """Names of the files that the page links to.

    Attributes:
        numbers: the JSON.
        plot: the plot, or None if there is none.
    """

    numbers: str
    plot: str | None


def render(saved: Saved, files: Files) -> str:
    """The page as Markdown."""
    results = list(saved.results.values())
    commands = "\n".join(saved.commands)
    parts = [
        _HEAD.format(commands=commands, machine=saved.machine, numbers=files.numbers),
        f"![Times over the floor]({files.plot})\n" if files.plot else "No plot: matplotlib is not installed.\n",
    ]
    cases = [case for case in CASES.values() if any(result.cell.case == case.name for result in results)]
    for case in cases:
        of_case = [result for result in results if result.cell.case == case.name]
        parts.append(f"## {case.name}\n\n{_says(case)}\n\n{_summary(case, of_case)}\n")
    parts.append("# All contenders\n")
    parts += [_details(result) for case in cases for result in results if result.cell.case == case.name]
    return "\n".join(parts)


_HEAD = """# Speed of experts

How fast each expert kernel is beside transformers' implementations, beside dense layers of the same size, and beside the
least time that this machine needs for it. What these words mean exactly is said in [How it is measured](index.md#moesaic-bench).

<!-- no-run: takes many minutes -->
```bash
{commands}
```

Measured on {machine}. All samples are in [{numbers}]({numbers}).
"""


def _says(case: Case) -> str:
    dense = f"The dense layer is `{case.dense}`."
    return f"{case.says[0].upper()}{case.says[1:]}. {dense}" if case.timed else f"{case.says.capitalize()}."


def _summary(case: Case, results: Sequence[CellResult]) -> str:
    """One row for each cell: the floor, the dense layer, what moesaic does by itself, and the best of the others."""
    unit = "ms" if case.timed else "MB"
    families = [family for family in ("dense", "moesaic", "transformers", "llama.cpp") if _any(results, family)]
    heads = ["layer", "type", "tokens", "threads"]
    if case.timed:
        heads.append(f"floor, {unit}")
    heads += [f"best of {family}, {unit}" if family == "transformers" else f"{family}, {unit}" for family in families]
    heads += ["moesaic / dense", "moesaic / transformers"]
    if case.timed:
        heads.append("moesaic / floor")
    if case.cold:
        heads.append("of bandwidth")
    rows = []
    for result in results:
        cell, ours = result.cell, result.ours
        skewed = "" if cell.routing == "balanced" else f", {cell.routing}"
        row = [f"{cell.shape.name}{skewed}", cell.dtype, f"{cell.tokens:,}", str(cell.threads or "-")]
        if case.timed:
            row.append(tables.number(1e3 * result.floor))
        row += [_best(result, family) for family in families]
        row += [_ratio(result, ours, result.dense), _ratio(result, ours, result.best("transformers"))]
        if case.timed:
            row.append("-" if ours is None else tables.ratio(ours.median / result.floor))
        if case.cold:
            row.append("-" if ours is None else f"{result.weight_bandwidth(ours) / result.rates.bandwidth:.0%}")
        rows.append(row)
    return markdown(heads, rows)


def _any(results: Iterable[CellResult], family: str) -> bool:
    return any(row.family == family for result in results for row in result.rows)


def _best(result: CellResult, family: str) -> str:
    row = {"dense": result.dense, "moesaic": result.ours}.get(family, result.best(family))
    if row is None:
        return "-"
    value = tables.number((1e3 if result.cell.kind.timed else 1e-6) * row.median)
    name = row.name.partition(":")[2] if family != "dense" else ""
    return f"{value} ({name})" if name else value


def _ratio(result: CellResult, row: Row | None, other: Row | None) -> str:
    return "-" if row is None else tables.ratio(result.ratio(row, other))


def _details(result: CellResult) -> str:
    rows = [tables.values(result, row) for row in result.rows if row.measured]
    listed = "\n".join(f"- {line}" for line in [*tables.under(result), *tables.remarks(result)])
    label = result.cell.label + ("" if result.finished else " (interrupted)")
    return f"## {label}\n\n{markdown(tables.columns(result), rows)}\n\n{listed}\n"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
