"""The options of `moesaic eval` for tasks in JSONL files, and what they do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.cli.console import errors, results
from moesaic.cli.decodings import HELP, fast_decoding_of
from moesaic.errors import ConfigError
from moesaic.infer.consistency import Generate, SpecDecoding
from moesaic.infer.decode import DecodingSpec
from moesaic.infer.tasks import (
    ChoiceItem,
    GenerateItem,
    ResultsFile,
    Task,
    TaskResult,
    VoteRule,
    evaluate_task,
    load_task,
    read_results,
)

TaskFiles = Annotated[
    list[Path] | None,
    typer.Option("--task", metavar="FILE.jsonl", help="Task of your own (docs: Tasks); may be given several times."),
]
Samples = Annotated[int, typer.Option(min=1, help="Samples of each generated answer of a --task.")]
Vote = Annotated[
    VoteRule,
    typer.Option(help="How samples make an answer: a vote, one weighted by likelihood, or the likeliest sample's."),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, help="Of generated answers; 0 takes the likeliest token. 0, or 0.7 for several samples."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, help="Sample from the smallest set of this mass.", show_default="1, or what --decode says"
    ),
]
Decode = Annotated[list[str] | None, typer.Option("--decode", metavar="TEXT", help=HELP)]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of sampling.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="JSONL file for the result of every item, or folder for several decodings; what was cut short goes on.",
    ),
]
Compare = Annotated[Path | None, typer.Option(help="Results of another run on the same items, to compare with.")]
_SAMPLING_TEMPERATURE = 0.7


@dataclass(frozen=True)
class TaskOptions:
    """What was asked for on the command line."""

    files: Sequence[Path]
    samples: int
    vote: VoteRule
    temperature: float | None
    top_p: float | None
    seed: int
    output: Path | None
    compare: Path | None
    decodings: Sequence[DecodingSpec] = ()

    def check(self) -> None:
        """Check what can be before a model is loaded.

        Raises:
            ConfigError: for an option that would not be used, or can't be.
        """
        if not self.files:
            unused = {
                "--samples": self.samples > 1,
                "--output": self.output is not None,
                "--compare": self.compare is not None,
                "--temperature": self.temperature is not None and not self.decodings,
            }
            for option, given in unused.items():
                if given:
                    raise ConfigError(option, "given", "is only for --task", "give --task FILE.jsonl, or leave it out")
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError("--temperature", 0, "makes all samples equal", "raise it, or leave out --samples")
        names = [file.stem for file in self.files]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError("--task", name, "is the name of two files", "rename one")
        if self.output is not None and self.output.is_dir() and len(self.decodings) < 2:
            raise ConfigError("--output", str(self.output), "is a folder", "give the path of the JSONL file to write")

    def check_used(self, tasks: Sequence[Task], *, others: bool) -> None:
        """Check that --decode is of use to these tasks.

        Raises:
            ConfigError: if it, or a field of it, is not; `others` are tasks of which nothing is known yet.
        """
        if self.spec is None or others:
            return
        if not tasks:
            raise ConfigError(
                "--decode", self.spec.label, "is only for tasks", "give --task or --tasks, or leave it out"
            )
        items = [item for task in tasks for item in task.items.values()]
        for spec in self.decodings:
            spec.check_used(
                generated=any(isinstance(item, GenerateItem) for item in items),
                scored=any(isinstance(item, ChoiceItem) for item in items),
            )

    @property
    def spec(self) -> DecodingSpec | None:
        """What --decode says, or the first of what it says."""
        return self.decodings[0] if self.decodings else None

    @property
    def decoding(self) -> Generate:
        """What answers are generated with."""
        return Generate(**self.sampling) if self.spec is None else SpecDecoding(self.spec)

    @property
    def sampling(self) -> dict[str, Any]:
        """Fields of a generation config, without --decode."""
        default = _SAMPLING_TEMPERATURE if self.samples > 1 else 0.0
        temperature = default if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        return {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}

    def identity(self, folder: Path, tokenizer: PreTrainedTokenizerBase, override: Sequence[str]) -> dict[str, Any]:
        """What makes results those of this run: the model's files and all that decides what it answers."""
        others = () if self.spec is None else self.spec.companions
        draws = bool(self.sampling) if self.spec is None else self.spec.temperature > 0
        how = {"sampling": self.sampling} if self.spec is None else {"decoding": self.spec.to_dict()}
        return {
            "model": str(folder.resolve()),
            "files": _files(folder),
            "tokenizer": str(Path(tokenizer.name_or_path).resolve()),
            "override": list(override),
            **how,
            **({"companions": [_files(Path(str(other.name_or_path))) for other in others]} if others else {}),
            "seed": self.seed if draws else 0,
            "samples": self.samples,
            "vote": self.vote if self.samples > 1 else "",
        }


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """What tells a model's files from others."""
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json"))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def run_tasks(
    options: TaskOptions,
    tasks: Sequence[Task],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    identity: Mapping[str, Any],
    batch_size: int,
    limit: int | None,
    json: bool,
) -> dict[str, dict[str, Any]]:
    """Accuracy, what it cost, and the comparison with another run, by task."""
    baseline = None if options.compare is None else read_results(options.compare)
    file = None if options.output is None else ResultsFile(options.output, identity)
    report = {}
    with fast_decoding_of(model, *(options.spec.companions if options.spec else ())):
        for task in tasks:
            with _progress(task, limit, hidden=json) as advance:
                result = evaluate_task(
                    model,
                    tokenizer,
                    task,
                    decoding=options.decoding,
                    samples=options.samples,
                    vote=options.vote,
                    batch_size=batch_size,
                    seed=options.seed,
                    limit=limit,
                    results=file,
                    progress=advance,
                )
            report[task.name] = _report(result, baseline)
    return report


def read_tasks(options: TaskOptions) -> list[Task]:
    """The tasks of the files, before a model is loaded."""
    return [load_task(file) for file in options.files]


def print_tasks(report: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of tasks, and a line for each comparison."""
    table = Table("task", "items", "accuracy", "95 % interval", "unanswered", "tokens", "seconds", title="Tasks")
    for name, row in report.items():
        interval, usage = f"{row['low']:.1%} to {row['high']:.1%}", row["usage"]
        read = sum(usage[kind] for kind in ("prompt_tokens", "generated_tokens", "scored_tokens"))
        numbers = (f"{row['items']:,}", f"{row['value']:.1%}", interval, f"{row['unanswered']:,}", f"{read:,}")
        table.add_row(name, *numbers, f"{usage['seconds']:.1f}")
    results.print(table)
    for name, row in report.items():
        if "compared" in row:
            found = row["compared"]
            results.print(
                f"{name}: {found['difference']:+.1%} against the other run ({found['low']:+.1%} to {found['high']:+.1%}); "
                f"{found['gained']} gained, {found['lost']} lost, McNemar's p = {found['p_value']:.3g}",
                highlight=False,
            )


def _report(result: TaskResult, baseline: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    report = result.to_dict()
    return report if baseline is None else {**report, "compared": vars(result.compare(baseline))}


@contextlib.contextmanager
def _progress(task: Task, limit: int | None, *, hidden: bool) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = hidden or not errors.is_terminal
    with Progress(*columns, console=errors, transient=True, disable=hidden) as progress:
        bar = progress.add_task(task.name, total=min(len(task.items), limit or len(task.items)))
        yield lambda done: progress.advance(bar, done)
