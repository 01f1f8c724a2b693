"""Where commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

results = Console()
errors = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=VALUE", help="Override a field of the YAML file; may be given several times."),
]


_stdout: ContextVar[TextIO | None] = ContextVar("stdout", default=None)


@contextlib.contextmanager
def stdout_for_json() -> Iterator[None]:
    """While entered, stdout is `emit_json`'s alone: what libraries print (DeepSpeed does, once imported) goes to stderr."""
    token = _stdout.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout.reset(token)


def emit_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(value, indent=2, default=str), file=_stdout.get() or sys.stdout, flush=True)
