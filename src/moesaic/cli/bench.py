"""`moesaic bench`: speed of expert kernels beside transformers, dense layers and the limits of the machine."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moesaic import bench
from moesaic.bench import Case, Cell, CellResult, Shape
from moesaic.bench import table as tables
from moesaic.cli.console import Json, emit_json, errors, results
from moesaic.errors import ConfigError
from moesaic.papers.machine import describe_machine

Keep = Callable[[CellResult], None]
Tell = Callable[[Cell, str], None]

QUICK = "forward,forward-backward,decode"


def command(
    case: Annotated[
        str | None, typer.Option(metavar="A,B", help=f"What to measure: {', '.join(bench.CASES)}. Default: all.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Layer, such as d1024-f512-n64-k8; may be given several times. Default: three presets."),
    ] = None,
    tokens: Annotated[str | None, typer.Option(metavar="1,4", help="Tokens; each case has its own default.")] = None,
    dtype: Annotated[str, typer.Option(metavar="f32,bf16", help="Types: f32, bf16, f16.")] = "f32,bf16",
    threads: Annotated[
        str | None, typer.Option(metavar="1,2", help="Numbers of threads on the CPU. Default: torch's.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each contender.")] = 7,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds for one contender in one comparison; slower ones get fewer rounds.")
    ] = 10.0,
    only: Annotated[list[str] | None, typer.Option(help="Contender, or pattern such as 'moesaic:*'.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Contender or pattern to leave out.")] = None,
    routing: Annotated[str, typer.Option(help="How picks spread: balanced or skewed.")] = "balanced",
    device: Annotated[str, typer.Option(help="cpu, or an accelerator such as cuda.")] = "cpu",
    layers: Annotated[int, typer.Option(min=1, help="Of whole models.")] = 8,
    vocabulary: Annotated[int, typer.Option(min=2, help="Of whole models.")] = 8192,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that a model writes in a sample.")] = 32,
    llama_cpp: Annotated[
        str | None,
        typer.Option(metavar="PYTHON", help="Interpreter that has llama-cpp-python and gguf, if not this one."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, tokens and picks.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A small layer, in less than a minute.")] = False,
    time_limit: Annotated[
        float | None, typer.Option(min=0, help="Seconds after which to stop, with what is measured.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the results; a run goes on from what is there.")
    ] = Path("runs/bench"),
    docs: Annotated[
        Path | None,
        typer.Option("--write-docs", help="Also write page, numbers and plot into this folder, from all in --output."),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="bench.json of an earlier run, whose medians are put beside these.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Measure again what this command asks for.")] = False,
    json: Json = False,
) -> None:
    """Measure expert kernels beside transformers' and beside dense layers, in turns in one process.

    All get the same weights and picks and are checked against the loop kernel first. The floor is what bytes over
    measured bandwidth or FLOPs over the measured rate of a large product allow. Ctrl-C keeps what is measured; the same
    command goes on.

    Example: moesaic bench --case decode --shape d1024-f512-n64-k8 --dtype bf16 --threads 1,2
    """
    shapes = [Shape.parse(text) for text in shape or []] or ([bench.QUICK_SHAPE] if quick else list(bench.PRESETS))
    wanted = bench.cells(
        _cases(case or (QUICK if quick else ",".join(bench.CASES))),
        shapes,
        _dtypes(dtype),
        tokens=None if tokens is None else _numbers("--tokens", tokens),
        threads=[torch.get_num_threads()] if threads is None else _numbers("--threads", threads),
        routing=_routing(routing),
        device=_device(device),
    )
    options = bench.Options(
        rounds=rounds,
        patience=patience,
        seed=seed,
        only=tuple(only or ()),
        skip=tuple(skip or ()),
        time_limit=time_limit,
        quick=quick,
        model=bench.ModelSize(layers, vocabulary, new_tokens),
        llama_cpp=llama_cpp,
    )
    earlier = None if compare is None else bench.read(compare)
    path = output / bench.NAME
    store = bench.Store(path, describe_machine(), _command_line(sys.argv[1:]), restart=restart)
    if restart:
        for cell in wanted:
            store.results.pop(cell, None)
    with _shown(wanted, store, json) as (keep, tell):
        run = bench.run_bench(wanted, options, earlier=store.results.values(), keep=keep, tell=tell)
    folders = [folder for folder in (output, docs) if folder is not None and store.results]
    pages = [bench.write_page(path, folder, png=folder is output) for folder in folders]
    found = [] if earlier is None else bench.changes(earlier, store)
    if json:
        compared = {} if earlier is None else {"changes": [change.to_dict() for change in found]}
        emit_json(
            {
                **store.to_dict(),
                "stopped": run.stopped,
                "missing": [cell.to_dict() for cell in run.missing],
                "pages": pages,
                **compared,
            }
        )
    else:
        if earlier is not None:
            _print_changes(found, earlier.machine, store.machine)
        for page in pages:
            results.print(f"Page, numbers and plot: {page}", highlight=False, soft_wrap=True)
    if run.stopped is not None:
        errors.print(
            f"Stopped ({run.stopped}): {len(wanted) - len(run.missing)} of {len(wanted)} comparisons are finished, "
            f"what was measured is in {path}. The same command goes on.",
            soft_wrap=True,
        )
        raise typer.Exit(130 if run.stopped == "interrupted" else 0)


@contextlib.contextmanager
def _shown(wanted: list[Cell], store: bench.Store, json: bool) -> Iterator[tuple[Keep, Tell]]:
    """What a person sees: a bar of comparisons on a terminal, each table as soon as it is there."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=len(wanted), completed=sum(cell in store.results for cell in wanted))

        def tell(cell: Cell, text: str) -> None:
            progress.update(task, description=escape(f"{cell.label}: {text}"))

        def keep(result: CellResult) -> None:
            store.keep(result)
            progress.advance(task)
            if not json:
                _print(result)

        yield keep, tell


def _print(result: CellResult) -> None:
    title = result.cell.label + ("" if result.finished else " (interrupted)")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(tables.columns(result)):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in result.rows:
        if row.measured:
            table.add_row(*map(escape, tables.values(result, row)), style="green" if row.family == "moesaic" else "")
    results.print(table)
    for line in [*tables.under(result), *tables.remarks(result)]:
        results.print(escape(line), style="dim", highlight=False, soft_wrap=True)
    results.print()


def _print_changes(found: list[bench.Change], before: str, after: str) -> None:
    if before != after:
        errors.print(f"Note: the earlier run was on another machine or version: {before}", soft_wrap=True)
    table = Table(title="Beside the earlier run", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("comparison", "contender"):
        table.add_column(heading)
    for heading in ("before", "now", "ratio"):
        table.add_column(heading, justify="right")
    for change in found:
        scale = 1e3 if change.cell.kind.timed else 1e-6
        numbers = (tables.number(scale * value) for value in (change.before, change.after))
        table.add_row(change.cell.label, change.name, *numbers, tables.number(change.ratio))
    results.print(table)


def _command_line(arguments: list[str]) -> str:
    """The command as others can give it: without the paths of this machine."""
    found, private = ["moesaic"], False
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        if private:
            argument = "PYTHON"
        elif option == "--llama-cpp" and equals:
            argument = f"{option}=PYTHON"
        private = argument == "--llama-cpp"
        found.append(argument)
    return shlex.join(found)


def _cases(text: str) -> list[Case]:
    return [bench.case_named(name) for name in text.split(",")]


def _dtypes(text: str) -> list[str]:
    for name in text.split(","):
        if name not in bench.DTYPES:
            raise ConfigError("--dtype", name, "is not a type", f"choose from {', '.join(bench.DTYPES)}")
    return text.split(",")


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise ConfigError(option, text, "is not a list of positive whole numbers", "write them as 1,2")
    return found


def _routing(name: str) -> str:
    if name not in bench.ROUTINGS:
        raise ConfigError("--routing", name, "is not known", f"choose from {', '.join(bench.ROUTINGS)}")
    return name


def _device(name: str) -> str:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError("--device", name, "can't be used", f"use cpu; torch says: {error}") from None
    return name
