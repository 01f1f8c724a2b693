"""`moesaic train`: a YAML file becomes a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.console import Json, Set, emit_json, results
from moesaic.dist.launch import launch
from moesaic.dist.process import Process
from moesaic.errors import ConfigError
from moesaic.train import RunConfig, TrainResult, overall, train
from moesaic.train.ranks import check_parallel

_GRACE_SECONDS = 60.0  # to write a checkpoint in


def command(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoints and metrics.")],
    overrides: Set = None,
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--no-resume", help="Insist on a checkpoint to go on from, or on none. Default: either."),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of tokenised text, to share it between runs.")] = None,
    processes: Annotated[
        int, typer.Option("--nproc", min=1, help="Processes to start here and share the training between.")
    ] = 1,
    json: Json = False,
) -> None:
    """Train the model that a YAML file describes; run it again to resume.

    The file has the sections backbone, moe, data, train and parallel (docs: Training). Ctrl-C stops after the current
    step with a checkpoint. A checkpoint is a HF model folder: from_pretrained loads it after `import moesaic`. Under
    torchrun (docs: Distributed training) the same command trains on many hosts.

    Example: moesaic train run.yaml -o runs/first --nproc 2 --set train.steps=200 --set moe.router.top_k=4
    """
    run = RunConfig.from_yaml(config, overrides or [])
    if processes > 1:
        raise typer.Exit(_in_processes(run, processes, context, config, output, overrides, resume, cache, json))
    result = train(run, output, resume="auto" if resume is None else resume, cache_dir=cache, progress=not json)
    if not Process.of_environment().is_first:
        pass
    elif json:
        emit_json(summary(result))
    else:
        state = "Finished" if result.finished else "Stopped"
        results.print(f"{state} after step {result.step}: {result.checkpoint}")
        results.print(f"Next: moesaic generate {output} --prompt 'The'   or   moesaic inspect {output}")
    raise typer.Exit(result.exit_code)


def _in_processes(
    run: RunConfig,
    processes: int,
    context: typer.Context,
    config: Path,
    output: Path,
    overrides: list[str] | None,
    resume: bool | None,
    cache: Path | None,
    json: bool,
) -> int:
    """Run this command in several processes; their exit code."""
    if Process.of_environment().distributed:
        raise ConfigError("--nproc", processes, "is given under torchrun", "leave it out: torchrun has started all")
    check_parallel(run, Process(world=processes, local_world=processes, distributed=True))
    options = context.parent.params if context.parent is not None else {}
    arguments = [f"--{name}" for name in ("debug", "verbose") if options.get(name)]
    arguments += ["train", str(config), "--output", str(output)]
    arguments += [part for override in overrides or [] for part in ("--set", override)]
    if resume is not None:
        arguments.append("--resume" if resume else "--no-resume")
    if cache is not None:
        arguments += ["--cache", str(cache)]
    if json:
        arguments.append("--json")
    # A step that waits for a process that hangs fails after that time; then nothing more is worth waiting for.
    grace = run.parallel.timeout_seconds + _GRACE_SECONDS
    return launch(processes, arguments, grace_seconds=grace, quiet=not options.get("debug"))


def summary(result: TrainResult) -> dict:
    """What JSON output says of a run."""
    return {
        "step": result.step,
        "finished": result.finished,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 2),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "validation": {domain: vars(evaluation) for domain, evaluation in result.validation.items()},
        "validation_loss": overall(result.validation).loss if result.validation else None,
        "checkpoint": str(result.checkpoint),
        "metrics": str(result.metrics_file),
    }
