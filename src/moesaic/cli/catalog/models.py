"""`moesaic catalog models`: published models, filtered and sorted."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from moesaic.catalog import CannotCount, ModelRecord, models, preset
from moesaic.catalog.schema import RouterKind
from moesaic.cli.console import Json, emit_json, results
from moesaic.errors import ConfigError
from moesaic.trace.accounting import short

_UNITS = {"": 1e0, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


Order = Literal["name", "year", "total", "active"]


def command(
    min_total: Annotated[str | None, typer.Option(metavar="SIZE", help="At least so many parameters, as 10B.")] = None,
    max_total: Annotated[str | None, typer.Option(metavar="SIZE", help="At most so many.")] = None,
    router: Annotated[
        str | None, typer.Option(help="How experts are chosen: softmax_topk, sigmoid_topk, or a router.type of ours.")
    ] = None,
    buildable: Annotated[
        bool | None, typer.Option("--buildable/--not-buildable", help="Only what has a preset, or only what has none.")
    ] = None,
    search: Annotated[str | None, typer.Option(help="Only models that hold this text.")] = None,
    sort: Annotated[Order, typer.Option(help="Largest and newest first, or by name.")] = "name",
    json: Json = False,
) -> None:
    """List published model configurations, with parameters recomputed from their shapes.

    Totals in brackets are the printed ones of models that can't be counted; --min-total and --max-total compare these, too.

    Example: moesaic catalog models --min-total 10B --router sigmoid_topk --sort active
    """
    least, most = _parameters("--min-total", min_total), _parameters("--max-total", max_total)
    rows = [_Row(record) for record in models()]
    rows = [row for row in rows if _inside(row.any_total, least, most)]
    if router is not None:
        rows = _routed(rows, router)
    if buildable is not None:
        rows = [row for row in rows if row.record.buildable == buildable]
    if search is not None:
        rows = [row for row in rows if search.lower() in row.text]
    if sort != "name":
        rows.sort(key=lambda row: -(getattr(row, f"any_{sort}") or 0))
    if json:
        emit_json({"models": [row.facts() for row in rows]})
        return
    _print(rows)


class _Row:
    """A record, with its parameters where they can be counted."""

    def __init__(self, record: ModelRecord) -> None:
        self.record = record
        try:
            size = record.size()
        except CannotCount:
            self.total = self.active = None
        else:
            self.total, self.active = size.total, size.active
        published = record.published
        self.printed_total = None if published is None else 1e9 * published.total.billions
        active = None if published is None else published.active
        self.printed_active = None if active is None else 1e9 * active.billions
        self.text = " ".join(
            map(str, (record.name, record.title, record.arxiv, record.details, record.architecture, record.router.kind))
        ).lower()

    @property
    def any_total(self) -> float | None:
        return self.printed_total if self.total is None else self.total

    @property
    def any_active(self) -> float | None:
        return self.printed_active if self.active is None else self.active

    @property
    def any_year(self) -> int:
        return self.record.year

    def facts(self) -> dict[str, Any]:
        record = self.record
        return {
            "name": record.name,
            "title": record.title,
            "year": record.year,
            "architecture": record.architecture,
            "parameters": None if self.total is None else {"total": self.total, "active": self.active},
            "published": None if record.published is None else record.published.to_dict(),
            "router": record.router.to_dict(),
            "buildable": record.buildable,
            "deviations": list(record.deviations),
            "unbuildable": None if record.unbuildable is None else record.unbuildable.reason,
        }


def _print(rows: list[_Row]) -> None:
    table = Table("name", "year", box=SIMPLE_HEAD)
    for name in ("total", "active", "layers", "experts"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("router")
    table.add_column("built")
    for row in rows:
        record = row.record
        table.add_row(
            record.name,
            str(record.year),
            _size(row.total, row.printed_total),
            _size(row.active, row.printed_active),
            str(record.shape.layers),
            record.picks,
            record.router.kind,
            record.built,
        )
    results.print(table)
    results.print(f"{len(rows)} models. `moesaic catalog show NAME` says in what `nearly` differs, and why `no`.")


def _size(counted: float | None, printed: float | None) -> str:
    if counted is not None:
        return short(counted)
    return "-" if printed is None else f"({short(printed)})"


def _parameters(option: str, text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([kMBT]?)", text.strip())
    if found is None:
        raise ConfigError(option, text, "is not a number of parameters", "write it as 10B or 700M")
    return float(found[1]) * _UNITS[found[2]]


def _inside(total: float | None, least: float | None, most: float | None) -> bool:
    if total is None:
        return least is None and most is None
    return (least is None or total >= least) and (most is None or total <= most)


def _routed(rows: list[_Row], router: str) -> list[_Row]:
    """Rows whose router is of this kind, in the survey's words or in ours."""
    ours = {row.record.name: preset(row.record.name).moe.router.type for row in rows if row.record.buildable}
    if router not in get_args(RouterKind) and router not in ours.values():
        known = ", ".join(sorted({*get_args(RouterKind), *ours.values()}))
        raise ConfigError("--router", router, "is the router of no model here", f"choose one of {known}")
    return [row for row in rows if router in (row.record.router.kind, ours.get(row.record.name))]
