"""Where commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

results = Console()
errors = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=VALUE", help="Override a field of the YAML file; may be given several times."),
]


def emit_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(value, indent=2, default=str))
