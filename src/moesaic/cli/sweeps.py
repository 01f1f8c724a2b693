"""`moesaic eval` with several decodings: a table and a picture of accuracy against cost, and a choice on other items."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.cli.console import errors, results
from moesaic.cli.tasks import TaskOptions
from moesaic.errors import ConfigError
from moesaic.files import write_text
from moesaic.infer.decode import fast_decoding
from moesaic.infer.tasks import (
    CostSettings,
    Sweep,
    SweepPoint,
    Task,
    check_picture,
    choose,
    draw_sweep,
    load_task,
    sweep,
)
from moesaic.infer.tasks.sweep import Axis, Progress

ChooseFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--choose",
        metavar="FILE.jsonl",
        help="Choose among several decodings on this task, and report the best one once, on --task.",
    ),
]
Picture = Annotated[
    Path | None,
    typer.Option(help="Picture of accuracy against cost of several decodings, .svg, .png, .pdf or .html."),
]
CostAxis = Annotated[
    Axis | None,
    typer.Option(
        "--cost", help="What the cost of several decodings is: seconds (unless --no-timing), bytes or positions."
    ),
]
Timing = Annotated[
    bool, typer.Option(help="Time several decodings beside each other, on a few prompts, after they were evaluated.")
]


@dataclass(frozen=True)
class SweepOptions:
    """What was asked for on the command line, beside the options of tasks."""

    choose: Sequence[Path]
    picture: Path | None
    axis: Axis | None
    timing: bool

    def check(self, options: TaskOptions, others: Mapping[str, bool]) -> None:
        """Check what can be before a model is loaded.

        Args:
            options: those of tasks.
            others: options that do not go with several decodings, and whether they were given.

        Raises:
            ConfigError: for an option that would not be used, or can't be.
        """
        own = {
            "--choose": bool(self.choose),
            "--picture": self.picture is not None,
            "--cost": self.axis is not None,
            "--no-timing": not self.timing,
        }
        several = len(options.decodings) > 1
        for option, given in (others if several else own).items():
            if given and several:
                raise ConfigError(option, "given", "does not go with several decodings", "leave it out, or give one")
            if given:
                raise ConfigError(
                    option, "given", "is for several decodings", "give --decode with braces, or several times"
                )
        if not several:
            return
        if not options.files:
            raise ConfigError("--decode", "several decodings", "are compared on a task", "give --task FILE.jsonl")
        if options.output is not None and options.output.exists() and not options.output.is_dir():
            raise ConfigError(
                "--output", str(options.output), "is a file", "give a folder: there are several decodings"
            )
        if self.axis == "seconds" and not self.timing:
            raise ConfigError("--cost", "seconds", "are not measured with --no-timing", "leave one of the two out")
        if self.picture is not None:
            check_picture(self.picture)

    def read(self) -> list[Task]:
        """The tasks to choose on, before a model is loaded."""
        return [load_task(file) for file in self.choose]


def run_sweep(
    wanted: SweepOptions,
    validation: Sequence[Task],
    options: TaskOptions,
    tasks: Sequence[Task],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    identity: Mapping[str, Any],
    batch_size: int,
    limit: int | None,
    json_only: bool,
) -> dict[str, Any]:
    """Evaluate, measure, print unless only JSON is wanted, write and draw; the report."""
    given: dict[str, Any] = {
        "folder": options.output,
        "run": identity,
        "samples": options.samples,
        "vote": options.vote,
        "batch_size": batch_size,
        "seed": options.seed,
        "limit": limit,
        "cost": CostSettings(timed=wanted.timing),
    }
    chosen = None
    with fast_decoding(model), _progress(hidden=json_only) as progress:
        if validation:
            chosen = choose(model, tokenizer, validation, tasks, options.decodings, progress=progress, **given)
        found = (
            chosen.validation
            if chosen is not None
            else sweep(model, tokenizer, tasks, options.decodings, progress=progress, **given)
        )
    axis = wanted.axis or found.axis
    report: dict[str, Any] = {"axis": axis, **(found.to_dict() if chosen is None else chosen.to_dict())}
    if chosen is not None and chosen.overlap:
        errors.print(
            f"Warning: {chosen.overlap} of {chosen.chosen.accuracy.items} items of --task are items of --choose too. What was "
            "chosen on an item looks better on it than it is: report on other items.",
            style="yellow",
        )
    files = _files(wanted, options.output, found, axis)
    if options.output is not None:
        write_text(options.output / "sweep.json", json.dumps(report, indent=2) + "\n")
    if not json_only:
        _print_table(found, axis, "Decodings by cost" if chosen is None else "Decodings on --choose by cost")
        if chosen is not None:
            _print_choice(chosen.test.points, chosen.overlap)
        for file in files:
            results.print(f"Picture: {file}", highlight=False, soft_wrap=True)
    return {**report, "pictures": [str(file) for file in files]}


def _files(wanted: SweepOptions, folder: Path | None, found: Sweep, axis: Axis) -> list[Path]:
    """Draw where it was asked for, or in the folder if there is something to draw with."""
    if wanted.picture is not None:
        return draw_sweep(found, wanted.picture, axis=axis)
    if folder is None or importlib.util.find_spec("matplotlib") is None:
        return []
    return draw_sweep(found, folder / "sweep.svg", axis=axis)


def _print_table(found: Sweep, axis: Axis, title: str) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("decoding", overflow="fold", min_width=22)
    for number in ("right", "95 %", "time", "bytes", "tokens", "+/-", "p"):
        table.add_column(number, justify="right", no_wrap=True)
    front = found.front(axis)
    for point in found.by_cost(axis):
        cost, compared, right = point.cost, point.compared, point.accuracy
        assert cost is not None, "measured in every sweep of this command"
        paired = ("", "")
        if compared is not None:
            paired = (f"+{compared.gained} -{compared.lost}", f"{compared.p_value:.2g}")
        table.add_row(
            f"{point.label}{' *' if point in front else ''}",
            f"{right.value:.1%}",
            f"{100 * right.low:.0f}-{100 * right.high:.0f}",
            "-" if cost.time_ratio is None else f"{cost.time_ratio:.2f}",
            f"{cost.bytes_ratio:.2f}",
            f"{cost.positions:.2f}",
            *paired,
            style="bold" if point in front else None,
        )
    results.print(table)
    first = found.points[0]
    results.print(
        f"* none is cheaper and as accurate. Time and bytes for a new token are multiples of those of '{first.label}'; tokens "
        "are what goes through the model for it; +/- are items gained and lost against it, p is McNemar's.",
        highlight=False,
    )


def _print_choice(points: Sequence[SweepPoint], overlap: int) -> None:
    *_, best = points
    right, where = best.accuracy, "--task" + (f", {overlap} items of which it was chosen on" if overlap else "")
    results.print(
        f"Chosen: '{best.label}'; {right.value:.1%} right ({right.low:.1%} to {right.high:.1%}) on {where}",
        highlight=False,
    )
    if best.compared is not None:
        found = best.compared
        results.print(
            f"{found.difference:+.1%} against '{points[0].label}' ({found.low:+.1%} to {found.high:+.1%}); {found.gained} gained, "
            f"{found.lost} lost, McNemar's p = {found.p_value:.3g}",
            highlight=False,
        )


@contextlib.contextmanager
def _progress(*, hidden: bool) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=errors, transient=True, disable=hidden or not errors.is_terminal) as bars:
        bar = bars.add_task("")
        yield lambda what, done, total: bars.update(bar, description=what, completed=done, total=total)
