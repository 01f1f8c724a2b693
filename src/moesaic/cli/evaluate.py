"""`moesaic eval`: perplexity by domain, tasks in files, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.cli.console import Json, emit_json, results
from moesaic.cli.decodings import decodings_of
from moesaic.cli.models import load, tokenizer_of
from moesaic.cli.overrides import Override, routing_of
from moesaic.cli.sweeps import ChooseFiles, CostAxis, Picture, SweepOptions, Timing, run_sweep
from moesaic.cli.tasks import (
    Compare,
    Decode,
    Output,
    Samples,
    Seed,
    TaskFiles,
    TaskOptions,
    Temperature,
    TopP,
    Vote,
    print_tasks,
    read_tasks,
    run_tasks,
)
from moesaic.cli.texts import Texts, batches_of, sequence_length_for
from moesaic.cli.tracing import TracePath, TraceSample, labelled, trace_report, traced
from moesaic.errors import ConfigError
from moesaic.infer.decode import DecodingSpec
from moesaic.train import evaluate, overall


def command(
    model: Annotated[Path, typer.Argument(help="Folder of a model or of a training run.")],
    texts: Texts = None,
    task_files: TaskFiles = None,
    samples: Samples = 1,
    vote: Vote = "majority",
    decode: Decode = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = 0,
    output: Output = None,
    compare: Compare = None,
    choose: ChooseFiles = None,
    picture: Picture = None,
    cost: CostAxis = None,
    timing: Timing = True,
    tasks: Annotated[str | None, typer.Option(help="lm-evaluation-harness tasks, comma separated.")] = None,
    tasks_folder: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Batches of a domain, or examples of a task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 8,
    sequence_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens in a sequence of --text; 256 unless the model has fewer positions."),
    ] = None,
    override: Override = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the tokenizer, if it is not the model's.")] = None,
    trace: TracePath = None,
    trace_sample: TraceSample = 1.0,
    json: Json = False,
) -> None:
    """Measure perplexity on text, domain by domain, or run evaluation tasks: of files of your own, or of lm-evaluation-harness.

    Without --text, --task and --tasks, a model of a training run is measured on the text that the run held out. With --trace,
    the routing of all that is read goes to disk. With several decodings, accuracy is set against cost.

    Example: moesaic eval runs/demo/moe --text code=src --text prose=README.md
    """
    decodings = decodings_of(decode, samples=samples, temperature=temperature, top_p=top_p)
    options = TaskOptions(task_files or (), samples, vote, temperature, top_p, seed, output, compare, decodings)
    options.check()
    swept = SweepOptions(choose or (), picture, cost, timing)
    not_swept = {"--text": bool(texts), "--tasks": tasks is not None, "--trace": trace is not None}
    swept.check(options, {**not_swept, "--compare": compare is not None})
    own_tasks, validation = read_tasks(options), swept.read()
    options.check_used(own_tasks, others=tasks is not None)
    network, folder = load(model)
    tokens = tokenizer_of(folder, network, tokenizer)
    report: dict[str, Any] = {"override": list(override)} if override else {}
    if len(decodings) > 1:
        identity = dataclasses.replace(options, decodings=()).identity(folder, tokens, override or ())
        sizes: dict[str, Any] = {"batch_size": batch_size, "limit": limit}
        with routing_of(network, override):
            report["sweep"] = run_sweep(
                swept, validation, options, own_tasks, network, tokens, identity=identity, json_only=json, **sizes
            )
        if json:
            emit_json(report)
        return
    report |= {"decoding": options.spec.label} if options.spec else {}
    with routing_of(network, override), traced(trace, trace_sample, network, tokens) as recorded:
        if texts or not (tasks or own_tasks):
            length = sequence_length_for(network, sequence_length)
            with batches_of(texts, tokens, folder, batch_size=batch_size, sequence_length=length) as batches:
                by_domain = evaluate(network, labelled(recorded, batches), max_batches=limit)
            report["domains"] = {name: vars(evaluation) for name, evaluation in by_domain.items()}
            report["overall"] = vars(overall(by_domain))
        if own_tasks:
            report["own_tasks"] = run_tasks(
                options,
                own_tasks,
                network,
                tokens,
                identity=options.identity(folder, tokens, override or ()),
                batch_size=batch_size,
                limit=limit,
                json=json,
            )
        if tasks:
            report["tasks"] = _run_harness(
                network,
                tokens,
                tasks.split(","),
                tasks_folder,
                options.spec,
                limit=limit,
                batch_size=batch_size,
                seed=seed,
            )
    report |= trace_report(recorded)
    if json:
        emit_json(report)
    else:
        _print(report)


def _run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    folder: Path | None,
    spec: DecodingSpec | None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """Metrics by task."""
    try:
        from moesaic.cli.harness import run_harness
    except ImportError:
        raise ConfigError("--tasks", ",".join(tasks), "needs lm-eval", "pip install 'moesaic[eval]'") from None
    if folder is not None and not folder.is_dir():
        raise ConfigError("--tasks-folder", str(folder), "is not a folder", "give the folder of your task files")
    return run_harness(model, tokenizer, tasks, folder, spec, **options)


def _print(report: dict[str, Any]) -> None:
    if "domains" in report:
        table = Table("domain", "loss", "perplexity", "tokens", title="Held-out text")
        rows = {**report["domains"], "all": report["overall"]}
        for name, row in rows.items():
            table.add_row(name, f"{row['loss']:.4f}", f"{row['perplexity']:.2f}", f"{row['tokens']:,}")
        results.print(table)
    if "decoding" in report:
        results.print(f"Decoding: {report['decoding']}", highlight=False, markup=False)
    if "own_tasks" in report:
        print_tasks(report["own_tasks"])
    if "tasks" in report:
        table = Table("task", "metric", "value", title="Tasks")
        for task, metrics in report["tasks"].items():
            for name, value in metrics.items():
                table.add_row(task, name, f"{value:.4f}")
        results.print(table)
    if "trace" in report:
        results.print(f"Routing of {report['trace']['tokens']:,} tokens: {report['trace']['path']}")
