"""`moesaic reproduce`: a paper's claim at a stated size, with its control arm and several seeds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from moesaic.cli.console import Json, Set, emit_json, errors, results
from moesaic.errors import ConfigError
from moesaic.papers import EXPERIMENTS, Reproduction, experiment_named, reproduce, size_names, write_docs, write_page
from moesaic.papers.machine import describe_machine
from moesaic.papers.write import content


def command(
    name: Annotated[str | None, typer.Argument(help="Which reproduction; --list names them.")] = None,
    wanted: Annotated[bool, typer.Option("--list", help="List the reproductions.")] = False,
    size: Annotated[str, typer.Option(help="cpu: minutes on two cores. gpu: nearer to the paper.")] = "cpu",
    seeds: Annotated[str, typer.Option(metavar="0,1,2", help="Seeds of initial weights and data order.")] = "0,1,2",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of runs and results; runs/NAME-SIZE by default.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            help="Arms to train side by side, a thread each. Default: one for each core; 1 on a GPU.",
        ),
    ] = None,
    docs: Annotated[
        Path | None, typer.Option("--write-docs", help="Also write page and index into this folder.")
    ] = None,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure again what is trained already.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Train anew instead of resuming.")] = False,
    overrides: Set = None,
    json: Json = False,
) -> None:
    """Train every arm of a paper's experiment with every seed, and say which of its claims show.

    --set changes a field of every arm's run, or with arms.NAME in front of one arm's. Ctrl-C stops with a checkpoint of
    every running arm; the same command goes on, and leaves alone what is finished.

    Example: moesaic reproduce deepseekmoe --seeds 0,1 --set train.steps=600
    """
    if wanted or name is None:
        _list(json)
        return
    experiment = experiment_named(name)
    numbers = _numbers(seeds)
    output = output or Path("runs") / f"{name}-{size}"
    if restart:
        _remove(output)
    found = reproduce(
        experiment,
        size,
        output,
        seeds=numbers,
        overrides=overrides or [],
        jobs=jobs,
        remeasure=remeasure,
        progress=not json,
    )
    if not found.finished:
        errors.print("Stopped. Run the same command to go on.")
        raise typer.Exit(found.exit_code or 1)
    page = write_page(found, output)
    if docs is not None:
        write_docs(found, docs)
    if json:
        emit_json({**content(found, describe_machine()), "page": str(page)})
        return
    results.print(_verdicts(found))
    results.print(f"Page, tables and plot: {page}", highlight=False, soft_wrap=True)


def _list(json: bool) -> None:
    if json:
        emit_json(
            [
                {"name": name, "question": experiment.question, "sizes": size_names(experiment)}
                for name, experiment in EXPERIMENTS.items()
            ]
        )
        return
    table = Table("name", "asks", "sizes", box=SIMPLE_HEAD)
    for name, experiment in EXPERIMENTS.items():
        table.add_row(name, experiment.question, ", ".join(size_names(experiment)))
    results.print(table)


def _numbers(seeds: str) -> list[int]:
    try:
        return [int(part) for part in seeds.split(",")]
    except ValueError:
        raise ConfigError("--seeds", seeds, "is not a list of whole numbers", "write them as 0,1,2") from None


def _remove(output: Path) -> None:
    """Remove an earlier reproduction, and nothing that is not one."""
    if output.exists():
        known = ("seed-", "data")
        strangers = [path.name for path in output.iterdir() if path.is_dir() and not path.name.startswith(known)]
        if strangers:
            raise ConfigError(
                "--output",
                str(output),
                f"holds {strangers[0]}, which is no part of a reproduction",
                "remove it yourself",
            )
        for path in output.iterdir():
            if path.is_dir() and path.name.startswith("seed-"):
                shutil.rmtree(path)


def _verdicts(found: Reproduction) -> Table:
    table = Table("claim", "advantage", "verdict", title=found.experiment.title, title_justify="left", box=SIMPLE_HEAD)
    styles = {"holds": "green", "does not hold": "red", "not resolved": "yellow"}
    for judgement in found.judgements():
        spread = f" ± {judgement.spread:.4f}" if len(judgement.values) > 1 else ""
        table.add_row(
            judgement.claim.name,
            f"{judgement.mean:+.4f}{spread}",
            f"[{styles[judgement.verdict]}]{judgement.verdict}[/]",
        )
    return table
