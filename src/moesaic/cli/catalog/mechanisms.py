"""`moesaic catalog mechanisms`: the survey's tree, and what moesaic has of it."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from moesaic.catalog import DECISIONS, Mechanism, branches, mechanisms
from moesaic.cli.console import Json, emit_json, results


def command(
    branch: Annotated[
        str | None, typer.Option(help="Only this branch of the tree: its path, or the end of it, as `expert-choice`.")
    ] = None,
    have: Annotated[
        bool | None,
        typer.Option("--have/--missing", help="Only what moesaic has, or only what it lacks, in whole or part."),
    ] = None,
    search: Annotated[str | None, typer.Option(help="Only entries that hold this text.")] = None,
    json: Json = False,
) -> None:
    """List the mechanisms of A Survey on Mixture of Experts, with what moesaic has of each and where.

    Example: moesaic catalog mechanisms --branch expert-merging --have
    """
    found = [entry for entry in mechanisms(branch) if _wanted(entry, have, search)]
    if json:
        emit_json({"mechanisms": [facts(entry) for entry in found]})
        return
    titles = branches()
    for path, entries in groupby(found, lambda entry: entry.path):
        table = Table(title=f"{path}: {titles[path]}", title_justify="left", box=SIMPLE_HEAD, expand=True)
        table.add_column("name", width=20, overflow="fold")
        table.add_column("year", width=4)
        table.add_column("what it is", ratio=3)
        table.add_column("moesaic", width=13)
        table.add_column("where, or why not", ratio=2, overflow="fold")
        for entry in entries:
            decision = entry.decision.replace("_", " ")
            table.add_row(entry.name, str(entry.year), entry.line, decision, entry.page or entry.reason)
        results.print(table)
    counts = Counter(entry.decision for entry in found)
    told = ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in DECISIONS if counts[name])
    results.print(f"{len(found)} mechanisms{': ' if told else ''}{told}")


def facts(entry: Mechanism) -> dict[str, Any]:
    """An entry for machines."""
    return {**entry.to_dict(), "have": entry.have, "link": entry.link}


def _wanted(entry: Mechanism, have: bool | None, search: str | None) -> bool:
    if have is True and not entry.have:
        return False
    if have is False and entry.complete:
        return False
    text = " ".join(map(str, (entry.name, entry.title, entry.line, entry.arxiv, entry.reason, entry.page)))
    return search is None or search.lower() in text.lower()
