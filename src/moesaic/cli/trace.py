"""`moesaic trace`: what a trace on disk is of and what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from moesaic.cli.console import Json, emit_json, results
from moesaic.trace import TraceFile
from moesaic.trace.storage.parquet import NO_STEP


def command(
    trace: Annotated[Path, typer.Argument(help="Folder of the trace.")],
    check: Annotated[
        bool, typer.Option("--check", help="Read every row, which finds damage that headers hide.")
    ] = False,
    json: Json = False,
) -> None:
    """Print what a trace is of: model, layers, domains, and rows by part.

    Example: moesaic trace runs/first/routing.trace
    """
    found = TraceFile(trace)
    report = summary(found)
    if check:
        report["rows_read"] = sum(len(rows) for rows in found.rows())
    if json:
        emit_json(report)
    else:
        _print(report)


def summary(trace: TraceFile) -> dict[str, Any]:
    """What is known of a trace without reading its rows."""
    steps = [part.facts for part in trace.parts if part.facts.last_step != NO_STEP]
    return {
        "path": str(trace.path),
        **trace.header.to_dict(),
        "rows": len(trace),
        "bytes": sum(part.path.stat().st_size for part in trace.parts),
        "processes": len({part.facts.rank for part in trace.parts}),
        "first_step": min((facts.first_step for facts in steps), default=None),
        "last_step": max((facts.last_step for facts in steps), default=None),
        "parts": [{"file": part.path.name, **part.facts.to_dict()} for part in trace.parts],
    }


def _print(report: dict[str, Any]) -> None:
    facts = Table(show_header=False, title=f"Trace {report['path']}")
    steps = (
        f"{report['first_step']} to {report['last_step']}" if report["last_step"] is not None else "not of a training"
    )
    domains = ", ".join(name or "(none named)" for name in report["domains"])
    for name, value in (
        ("model", f"{report['model']} ({report['model_type']}, vocabulary {report['vocab_size']:,})"),
        ("tokenizer", report["tokenizer"] or "not known"),
        ("rows", f"{report['rows']:,} in {len(report['parts'])} parts of {report['processes']} processes"),
        ("size", decimal(report["bytes"])),
        ("documents", f"{report['sample']:.0%} of them"),
        ("steps", steps),
        ("domains", domains),
        ("scores", "of all experts" if report["has_scores"] else "not kept"),
        ("format", f"version {report['version']}, written by moesaic {report['moesaic']}"),
    ):
        facts.add_row(name, value)
    results.print(facts)
    layers = Table("layer", "router", "experts", "null experts", "picks")
    for index, layer in report["layers"].items():
        picks = str(layer["top_k"]) if layer["selects"] else "none"
        layers.add_row(str(index), layer["router"], str(layer["num_experts"]), str(layer["num_null"]), picks)
    results.print(layers)
    if "rows_read" in report:
        results.print(f"Read {report['rows_read']:,} rows: nothing is damaged.")
