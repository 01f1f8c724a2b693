"""`moesaic train`: a YAML file becomes a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.console import Json, Set, emit_json, results
from moesaic.train import RunConfig, TrainResult, overall, train


def command(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoints and metrics.")],
    overrides: Set = None,
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--no-resume", help="Insist on a checkpoint to go on from, or on none. Default: either."),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of tokenised text, to share it between runs.")] = None,
    json: Json = False,
) -> None:
    """Train the model that a YAML file describes; run it again to resume.

    The file has the sections backbone, moe, data and train (docs: Training). Ctrl-C stops after the current step with
    a checkpoint. A checkpoint is a HF model folder: from_pretrained loads it after `import moesaic`.

    Example: moesaic train run.yaml -o runs/first --set train.steps=200 --set moe.router.top_k=4
    """
    run = RunConfig.from_yaml(config, overrides or [])
    result = train(run, output, resume="auto" if resume is None else resume, cache_dir=cache, progress=not json)
    if json:
        emit_json(summary(result))
    else:
        state = "Finished" if result.finished else "Stopped"
        results.print(f"{state} after step {result.step}: {result.checkpoint}")
        results.print(f"Next: moesaic generate {output} --prompt 'The'   or   moesaic inspect {output}")
    raise typer.Exit(result.exit_code)


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
