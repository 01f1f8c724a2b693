"""`moesaic catalog`: mechanisms and published models as data, one command a file."""

from __future__ import annotations

import typer

from moesaic.cli.catalog import build, losses, mechanisms, models, show

app = typer.Typer(
    help="List, count and build what is known: mechanisms of the field and published models.",
    epilog="Start with `moesaic catalog models --buildable` or `moesaic catalog mechanisms --missing`.",
    no_args_is_help=True,
)
app.command("mechanisms")(mechanisms.command)
app.command("losses")(losses.command)
app.command("models")(models.command)
app.command("show")(show.command)
app.command("build")(build.command)

__all__ = ["app"]
