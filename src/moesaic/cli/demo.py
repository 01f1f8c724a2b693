"""`moesaic demo`: the whole path in a few minutes, on text that every machine with Python has."""

from __future__ import annotations

import shutil
import time
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
import yaml
from rich.table import Table

from moesaic.cli.console import Json, Set, emit_json, errors, results
from moesaic.cli.models import load
from moesaic.cli.train import summary
from moesaic.configuration import apply_overrides
from moesaic.errors import TrainingError
from moesaic.trace import Accounting, account, trace_batches, write_report
from moesaic.train import RunConfig, TrainResult, overall, read_metrics
from moesaic.train.comparison import Comparison, compare
from moesaic.train.loop import RUN_FILE

PROMPT = "def read_lines(path):"


def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything the demo makes.")] = Path(
        "runs/demo"
    ),
    restart: Annotated[bool, typer.Option(help="Start anew instead of resuming what is there.")] = False,
    overrides: Set = None,
    json: Json = False,
) -> None:
    """Train a small fine-grained MoE beside a dense model of equal active size, then use and inspect it.

    Takes about four minutes on two cores. Both see the same tokens of Python's documentation and standard library.
    Ctrl-C stops with a checkpoint; the same command goes on from there.

    Example: moesaic demo --set train.steps=300 --set moe.router.top_k=4
    """
    begun = time.perf_counter()
    run = demo_run(overrides)
    if restart:
        _remove_earlier(output)
    if not json:
        errors.print(f"Training the MoE, then the dense model, {run.train.steps} steps each, into {output}")
    comparison = compare(run, output, progress=not json)
    if comparison.dense is None or not comparison.dense.finished:
        stopped = comparison.dense or comparison.moe
        errors.print(f"Stopped after step {stopped.step}. Run the same command to go on.")
        raise typer.Exit(stopped.exit_code or 1)
    sample, report, accounts = _use(comparison, output)
    seconds = time.perf_counter() - begun
    if json:
        arms = {"moe": summary(comparison.moe), "dense": summary(comparison.dense)}
        emit_json({**arms, "seconds": round(seconds, 1), "sample": sample, "report": str(report)})
        return
    results.print(_table(comparison, comparison.dense, accounts))
    results.print("[bold]A sample of the MoE[/] (this small a model only knows what code looks like):")
    results.print(PROMPT + sample, markup=False, highlight=False, style="green")
    results.print(_where(comparison.moe, output, report, seconds), highlight=False, soft_wrap=True)


def demo_run(overrides: list[str] | None = None) -> RunConfig:
    """The run that ships with moesaic, with overrides."""
    text = resources.files("moesaic.cli").joinpath("demo.yaml").read_text(encoding="utf-8")
    return RunConfig.from_dict(apply_overrides(yaml.safe_load(text), overrides or []))


def _remove_earlier(output: Path) -> None:
    """Remove the arms of an earlier demo, and nothing that is not one."""
    for arm in (output / "moe", output / "dense"):
        if arm.exists() and not (arm / RUN_FILE).is_file() and any(arm.iterdir()):
            raise TrainingError(f"{arm} holds something else than a run; remove it yourself or choose another --output")
        shutil.rmtree(arm, ignore_errors=True)


def _use(comparison: Comparison, output: Path) -> tuple[str, Path, tuple[Accounting, Accounting]]:
    """A sample of the trained MoE, its routing report, and what both models cost."""
    assert comparison.dense is not None, "the caller checked"
    model, _ = load(comparison.moe.checkpoint)
    dense, _ = load(comparison.dense.checkpoint)
    tokenizer = comparison.data.tokenizer
    inputs: Any = tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(0)
    generated = cast(Any, model).generate(
        **inputs, max_new_tokens=48, do_sample=True, temperature=0.7, top_p=0.9, pad_token_id=tokenizer.pad_token_id
    )
    sample = str(tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    trace = trace_batches(model, comparison.data.validation_batches(), max_tokens=10_000)
    accounts = account(model), account(dense)
    report = write_report(
        output / "routing.html",
        trace,
        accounts[0],
        title="moesaic demo",
        tokenizer=tokenizer,
        facts={"checkpoint": str(comparison.moe.checkpoint), "text": "held out from the demo corpus"},
    )
    return sample, report, accounts


def _table(comparison: Comparison, dense: TrainResult, accounts: tuple[Accounting, Accounting]) -> Table:
    table = Table("", "MoE", "dense", title="Same tokens, equal active size", title_justify="left")
    moe, arms = comparison.moe, (comparison.moe, dense)
    for domain in moe.validation:
        table.add_row(f"validation loss, {domain}", *(f"{arm.validation[domain].loss:.4f}" for arm in arms))
    table.add_row("validation loss", *(f"{overall(arm.validation).loss:.4f}" for arm in arms), style="bold")
    table.add_row("parameters", *(f"{counted.total:,}" for counted in accounts))
    table.add_row("active for a token", *(f"{counted.active:,}" for counted in accounts))
    table.add_row("tokens", *(f"{arm.tokens:,}" for arm in arms))
    # From the metrics, which cover the whole run: this call may only have trained its last part, or nothing.
    times = [_training_seconds(arm) for arm in arms]
    table.add_row("tokens/s", *(f"{arm.tokens / time:,.0f}" for arm, time in zip(arms, times, strict=True)))
    table.add_row("training time", *(f"{time:.0f} s" for time in times))
    return table


def _training_seconds(arm: TrainResult) -> float:
    """Time spent in training steps, evaluation and checkpoints left out."""
    steps = [record for record in read_metrics(arm.metrics_file) if "tokens_per_second" in record]
    before = [0, *(record["tokens"] for record in steps)]
    return sum(
        (record["tokens"] - earlier) / record["tokens_per_second"]
        for record, earlier in zip(steps, before, strict=False)
    )


def _where(moe: TrainResult, output: Path, report: Path, seconds: float) -> str:
    return "\n".join(
        [
            f"Done in {seconds:.0f} s.",
            f"  checkpoint      {moe.checkpoint}",
            f"  routing report  {report.resolve().as_uri()}",
            f"  metrics         {moe.metrics_file}",
            "Try next:",
            f"  moesaic generate {output}/moe --prompt 'import os'",
            f"  moesaic eval {output}/moe",
            f"  moesaic inspect {output}/moe --text code=src --report src.html",
            "  moesaic demo --restart --set moe.router.top_k=2 --set moe.experts.intermediate_size=144",
        ]
    )
