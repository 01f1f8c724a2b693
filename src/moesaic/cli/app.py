"""The command line application: commands, global options, and how errors end."""

from __future__ import annotations

import contextlib
import errno
import logging
import sys
import time
from typing import Annotated

import torch
import typer
from huggingface_hub.utils import logging as hub_logging
from rich.logging import RichHandler
from rich.markup import escape
from transformers.utils import logging as transformers_logging

import moesaic
from moesaic.cli import (
    bench,
    catalog,
    convert,
    demo,
    evaluate,
    export,
    generate,
    inspect,
    plan,
    reproduce,
    trace,
    train,
    upcycle,
)
from moesaic.cli.console import errors, stdout_for_json
from moesaic.dist.launch import WorkerFailed, record_failure, seconds_to_wait
from moesaic.dist.process import LostPeer, Process
from moesaic.errors import MoesaicError

_REMEDIES = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.ENOTDIR: "a part of the path is a file; choose another path",
    errno.EEXIST: "a part of the path is a file; choose another path",
    errno.EISDIR: "give the path of a file",
    errno.ENOENT: "check the path",
}

app = typer.Typer(
    name="moesaic",
    help="Build, train, look at and use Mixture-of-Experts language models.",
    epilog="Start with `moesaic demo`. Every command explains itself with --help.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.command)
app.command("train")(train.command)
app.command("generate")(generate.command)
app.command("eval")(evaluate.command)
app.command("convert")(convert.command)
app.command("upcycle")(upcycle.command)
app.command("export")(export.command)
app.command("inspect")(inspect.command)
app.command("trace")(trace.command)
app.command("plan")(plan.command)
app.command("reproduce")(reproduce.command)
app.command("bench")(bench.command)
app.add_typer(catalog.app, name="catalog")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moesaic {moesaic.__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is chosen and why.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Build, train, look at and use Mixture-of-Experts language models."""
    level = logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING
    process, text = Process.of_environment(), "%(message)s"
    if not process.is_first and not debug:
        # What all processes say, the first says for them.
        level, text = logging.WARNING if verbose else logging.ERROR, f"rank {process.rank}: {text}"
    logging.basicConfig(level=level, format=text, handlers=[RichHandler(console=errors, show_path=debug)], force=True)
    if not debug:
        transformers_logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def main() -> None:
    """Entry point: runs a command and exits with its code.

    With several processes one of them prints the message, which then names its rank. A `MoesaicError`, a file system error or wrong usage ends with one message and code 2, anything unforeseen with one
    message and code 1; the traceback is only shown with --debug.
    """
    debug = "--debug" in sys.argv
    if debug:  # accepted before and after the command
        sys.argv = [sys.argv[0], "--debug", *(argument for argument in sys.argv[1:] if argument != "--debug")]
    try:
        with stdout_for_json() if "--json" in sys.argv else contextlib.nullcontext():
            app()
    except WorkerFailed as error:
        if error.message is not None:
            _print_error(error.message)
        sys.exit(error.exit_code)
    except Exception as error:
        _wait_for_the_cause(error)
        if debug:
            raise
        _print_error(_message(error))
        sys.exit(2 if isinstance(error, MoesaicError | OSError) else 1)


def _wait_for_the_cause(error: Exception) -> None:
    """Among several processes, give the one that knows the cause the time to say it."""
    process = Process.of_environment()
    if process.distributed:
        record_failure(error)
        time.sleep(seconds_to_wait(process, lost_peer=isinstance(error, LostPeer)))


def _print_error(message: str) -> None:
    errors.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)


def _message(error: Exception) -> str:
    process = Process.of_environment()
    if process.distributed and not isinstance(error, LostPeer):
        return f"rank {process.rank}: {_message_of(error)}"
    return _message_of(error)


def _message_of(error: Exception) -> str:
    if isinstance(error, MoesaicError):
        return str(error)
    if isinstance(error, OSError):
        remedy = _REMEDIES.get(error.errno or 0, "check the path and its permissions")
        return f"{error.filename or 'file system'}: {error.strerror or error}; {remedy}"
    if isinstance(error, torch.OutOfMemoryError):
        return "the device is out of memory; use a smaller batch or model, or --debug to see where"
    summary = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {summary}; --debug shows where, please report it with that output"
