"""`train` over processes gives the losses of one process."""

from __future__ import annotations

import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.distributed.spawn import run_ranks
from tests.train.builders import data_config, tiny_run, write_corpus

from moesaic.dist.process import Process
from moesaic.errors import TrainingError
from moesaic.train import CheckpointStore, RunConfig, Trainer, TrainResult, loop, read_metrics, train

STEPS = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def run_of(corpus: Path, parallel: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    settings = {"steps": STEPS, "eval_every": 10, "checkpoint_every": None, "learning_rate": 3e-3, **train}
    run = tiny_run(data_config(corpus), **settings)
    return RunConfig.from_dict({**run.to_dict(), "parallel": parallel or {}})


def trained(run: RunConfig, output: Path, cache: Path) -> TrainResult:
    return train(run, output, resume="auto", cache_dir=cache, progress=False)


@pytest.fixture(scope="module")
def alone(corpus: Path) -> TrainResult:
    """What one process makes of `run_of(corpus)`."""
    return trained(run_of(corpus), corpus / "alone", corpus / "cache")


def numbers(path: Path) -> list[dict[str, Any]]:
    """Losses of steps and evaluations."""
    names = ("step", "tokens", "loss", "gradient_norm")
    return [{name: record[name] for name in names if name in record} for record in read_metrics(path)]


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(2, {"ep": 2}), (4, {"dp_replicate": 2, "ep": 2, "partition_embedding": True}), (4, {"ep": 4})],
)
def test_losses_equal_one_process(
    corpus: Path, alone: TrainResult, tmp_path: Path, world: int, parallel: dict[str, Any]
) -> None:
    together = run_ranks(world, trained, run_of(corpus, parallel), tmp_path / "together", corpus / "cache")
    for result in together:
        assert result.validation.keys() == alone.validation.keys()
        for domain, found in result.validation.items():
            assert found.tokens == alone.validation[domain].tokens
            assert found.loss == pytest.approx(alone.validation[domain].loss, abs=1e-5)
    for found, expected in zip(numbers(together[0].metrics_file), numbers(alone.metrics_file), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_denoised_rows_are_those_of_one_process(corpus: Path, tmp_path: Path) -> None:
    """UL2, then causal language modelling: rows with and without padding lie on both ranks."""
    stages = [{"objective": {"type": "ul2"}, "until": 0.5}, {"objective": {"type": "causal_lm"}}]
    objective = {"type": "stages", "stages": stages}
    tokenizer = {"type": "train_bpe", "vocab_size": 290, "sentinels": 4}
    values = tiny_run(data_config(corpus, tokenizer=tokenizer, objective=objective), steps=4, eval_every=None).to_dict()
    alone = trained(RunConfig.from_dict(values), tmp_path / "alone", corpus / "cache")
    run = RunConfig.from_dict({**values, "parallel": {"ep": 2}})
    together = run_ranks(2, trained, run, tmp_path / "together", corpus / "cache")
    for found, expected in zip(numbers(together[0].metrics_file), numbers(alone.metrics_file), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_bfloat16_is_near_one_process(corpus: Path, tmp_path: Path) -> None:
    """Within a tenth of the step of bfloat16 at these losses; tests/distributed/test_precision.py looks closer."""
    settings: dict[str, Any] = {"precision": "bf16", "steps": 5, "eval_every": None}
    alone = trained(run_of(corpus, **settings), tmp_path / "alone", corpus / "cache")
    together = run_ranks(2, trained, run_of(corpus, {"ep": 2}, **settings), tmp_path / "together", corpus / "cache")
    losses = [
        [record["loss"] for record in numbers(result.metrics_file) if "loss" in record]
        for result in (alone, together[0])
    ]
    assert len(losses[0]) >= 5
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


def test_a_run_goes_on_with_any_number_of_processes(corpus: Path, tmp_path: Path) -> None:
    """Two processes, then four in another layout, then one; from an initial model that is read into shards."""
    settings: dict[str, Any] = {"steps": 9, "eval_every": None, "checkpoint_every": 3, "keep_checkpoints": 9}
    first = trained(run_of(corpus, steps=1, eval_every=None), tmp_path / "first", corpus / "cache").checkpoint
    origin = {"backbone": None, "moe": None, "initial_model": str(first)}
    run = RunConfig.from_dict({**run_of(corpus, **settings).to_dict(), **origin})
    alone = trained(run, tmp_path / "alone", corpus / "cache")

    together = tmp_path / "together"
    for world, parallel, step in [(2, {"ep": 2}, 3), (4, {"dp_replicate": 2, "ep": 2}, 6), (1, {}, 9)]:
        part = RunConfig.from_dict(run.to_dict() | {"parallel": parallel})
        if world == 1:
            trained(part, together, corpus / "cache")
        else:
            run_ranks(world, trained, part, together, corpus / "cache")
        # As if it had been interrupted: what came later is lost.
        for path in CheckpointStore(together / "checkpoints", 9).all():
            if path.name > f"step-{step:08d}":
                shutil.rmtree(path)
    for found, expected in zip(numbers(together / "metrics.jsonl"), numbers(alone.metrics_file), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_metrics_tell_how_processes_differ(corpus: Path, tmp_path: Path) -> None:
    strict = {"entropy": 1.0, "patience": 1}  # every layer is beyond it
    run = run_of(corpus, {"ep": 2}, steps=2, eval_every=None, routing_every=1, alerts=strict)
    first, second = run_ranks(2, trained, run, tmp_path, corpus / "cache")
    assert first.metrics_file == second.metrics_file
    records = [record for record in read_metrics(first.metrics_file) if record["type"] == "train"]
    assert [record["step"] for record in records] == [1, 2]  # once for all
    ranks = records[-1]["ranks"]
    assert ranks["processes"] == 2
    assert 0 < ranks["step_seconds"]["min"] <= ranks["step_seconds"]["mean"] <= ranks["step_seconds"]["max"]
    assert ranks["all_to_all"]["bytes"] > 0
    assert ranks["all_to_all"]["seconds"]["max"] > 0
    assert 0 <= ranks["rank_violation"]["worst"] <= 1

    # Loads of all processes together, and alerts from the first one only.
    for record in read_metrics(first.metrics_file):
        if record["type"] == "routing":
            assert [sum(load) for load in record["load"]] == [2 * records[0]["tokens"]] * 2
    alerts = [record for record in read_metrics(first.metrics_file) if record["type"] == "alert"]
    assert [(record["step"], record["layer"], record["state"]) for record in alerts] == [
        (1, 0, "started"),
        (1, 1, "started"),
    ]


def stopped(run: RunConfig, output: Path, cache: Path, number: int) -> TrainResult:
    """Training in which the last rank gets a signal in its third step."""
    step = Trainer.train_step

    def signalled(trainer: Trainer) -> Any:
        process = trainer.ranks.process
        if trainer.step == 2 and process.rank == process.world - 1:
            signal.raise_signal(number)
        return step(trainer)

    Trainer.train_step = signalled  # type: ignore[method-assign]
    return trained(run, output, cache)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_stops_all_with_a_checkpoint_that_any_number_resumes(
    corpus: Path, tmp_path: Path, number: int
) -> None:
    run = run_of(corpus, {"ep": 2}, steps=6, eval_every=None)
    whole = trained(run_of(corpus, steps=6, eval_every=None), tmp_path / "whole", corpus / "cache")
    results = run_ranks(2, stopped, run, tmp_path / "stopped", corpus / "cache", int(number))
    assert [(result.step, result.signal, result.exit_code) for result in results] == [(3, number, 128 + number)] * 2
    resumed = trained(run_of(corpus, steps=6, eval_every=None), tmp_path / "stopped", corpus / "cache")
    assert resumed.finished
    for found, expected in zip(numbers(resumed.metrics_file), numbers(whole.metrics_file), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def fails_together(run: RunConfig, output: Path, cache: Path) -> str:
    """The error of a training in which the loss of one rank is not finite."""
    objective = loop.language_model_objective

    def broken(model: Any, inputs: Any, num_items: int, output_z_loss: float) -> Any:
        found = objective(model, inputs, num_items, output_z_loss)
        bad = Process.of_environment().rank == 1
        return replace(found, cross_entropy=found.cross_entropy * (math.nan if bad else 1))

    loop.language_model_objective = broken
    try:
        trained(run, output, cache)
    except TrainingError as error:
        return str(error)
    return ""


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_with_the_same_error(corpus: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, fails_together, run_of(corpus, steps=2), tmp_path, corpus / "cache")
    assert first.startswith("step 1: the cross entropy is nan")
    assert first == second
