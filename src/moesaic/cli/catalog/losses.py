"""`moesaic catalog losses`: losses on the routing, by the names that models give."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from moesaic.catalog import losses
from moesaic.cli.console import Json, emit_json, results


def command(json: Json = False) -> None:
    """List losses on the routing with their formulas, usual coefficients, and whether moesaic has them.

    Example: moesaic catalog losses --json
    """
    found = losses()
    if json:
        emit_json({"losses": [loss.to_dict() for loss in found]})
        return
    table = Table("", "name", "formula", "balanced", "coefficients", "moesaic", box=SIMPLE_HEAD)
    for loss in found:
        cells = (loss.number, loss.name, loss.formula, str(loss.balanced), loss.weight, loss.decision)
        table.add_row(*map(escape, cells))
    results.print(table)
