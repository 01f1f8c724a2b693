from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
from tests.papers.tiny import EXPERIMENT

from moesaic.errors import CheckpointError, ConfigError, TrainingError
from moesaic.papers import Reproduction, reproduce
from moesaic.papers.progress import Display
from moesaic.papers.result import RESULT_FILE
from moesaic.train import CheckpointStore, Trainer, load_model


@pytest.fixture
def output(tmp_path: Path, data_folder: Path) -> Path:
    """A folder in which only the text is prepared."""
    shutil.copytree(data_folder, tmp_path / "out" / "data")
    return tmp_path / "out"


def losses(found: Reproduction) -> dict[tuple[int, str], float]:
    return {
        (seed, arm): result.measurements["loss"] for seed, arms in found.results.items() for arm, result in arms.items()
    }


def test_every_arm_is_trained_and_measured_with_every_seed(finished: Reproduction):
    assert finished.finished
    assert finished.exit_code == 0
    assert set(losses(finished)) == {(seed, arm) for seed in (0, 1) for arm in ("moe", "dense", "forked")}
    assert len(set(losses(finished).values())) == 6
    result = finished.results[1]["moe"]
    assert {"loss", "loss.prose", "loss.tables", "max_violation", "domain_information"} <= set(result.measurements)
    assert all(math.isfinite(value) for value in result.measurements.values())
    assert [tokens for tokens, _ in result.curve] == [3 * 4 * 32, 6 * 4 * 32]
    assert (result.tokens, result.parameters > result.active_parameters) == (6 * 4 * 32, True)
    assert "max_violation" not in finished.results[1]["dense"].measurements


def test_a_fork_starts_from_its_parent_of_the_same_seed(finished: Reproduction):
    for seed in (0, 1):
        folder = finished.output / f"seed-{seed}"
        parent = CheckpointStore(folder / "moe" / "checkpoints", 1).latest()
        assert parent is not None
        before, after = load_model(parent), load_model(*(folder / "forked").glob("initial-*"))
        name = "model.backbone.layers.0.mlp.gate.weight"
        assert after.get_parameter(name).allclose(2 * before.get_parameter(name))
        assert finished.results[seed]["forked"].tokens == 4 * 4 * 32


def test_a_fork_of_another_model_is_another_run(finished: Reproduction, output: Path):
    shutil.copytree(finished.output, output, dirs_exist_ok=True)
    for overrides in (["arms.forked.fork.factor=3.0"], ["arms.moe.train.steps=7"]):
        with pytest.raises(CheckpointError, match=r"forked/checkpoints/.* belongs to another run: initial_model"):
            reproduce(EXPERIMENT, "cpu", output, seeds=(0,), overrides=overrides, jobs=1, progress=False)


def test_judgements_leave_out_claims_on_arms_of_another_size(finished: Reproduction):
    verdicts = {judgement.claim.name: judgement.verdict for judgement in finished.judgements()}
    assert verdicts["Losses are positive"] == "holds"
    assert verdicts["Losses are negative"] == "does not hold"
    assert set(verdicts) == {"The MoE is better", "Losses are positive", "Losses are negative"}


def test_an_interrupted_reproduction_goes_on_where_it_was(
    finished: Reproduction, output: Path, monkeypatch: pytest.MonkeyPatch
):
    step, made = Trainer.train_step, []

    def stopping_step(trainer: Trainer):
        made.append(trainer.run.moe is not None)
        if len(made) == 9:  # the third step of the second arm
            signal.raise_signal(signal.SIGINT)
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", stopping_step)
    stopped = reproduce(EXPERIMENT, "cpu", output, seeds=(0, 1), jobs=1, progress=False)
    assert (stopped.finished, stopped.signal, stopped.exit_code) == (False, signal.SIGINT, 130)
    assert set(losses(stopped)) == {(0, "moe")}
    again = reproduce(EXPERIMENT, "cpu", output, seeds=(0, 1), jobs=1, progress=False)
    assert again.finished
    assert len(made) == 2 * (6 + 6 + 4)  # no step twice
    assert losses(again) == losses(finished)
    speed = "tokens_per_second"
    for mine, whole in zip(again.measured, finished.measured, strict=True):
        assert {arm: {**values, speed: 0} for arm, values in mine.items()} == {
            arm: {**values, speed: 0} for arm, values in whole.items()
        }


def test_what_is_finished_is_not_trained_again(finished: Reproduction, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Trainer, "train_step", lambda trainer: pytest.fail("trained again"))
    again = reproduce(EXPERIMENT, "cpu", finished.output, seeds=(1, 0), jobs=1, progress=False)
    assert losses(again) == losses(finished)
    path = finished.output / "seed-0" / "moe" / RESULT_FILE
    content = json.loads(path.read_text())
    content["measurements"]["loss"] = 99.0
    path.write_text(json.dumps(content))
    assert losses(reproduce(EXPERIMENT, "cpu", finished.output, seeds=(0,), progress=False))[0, "moe"] == 99.0
    measured = reproduce(EXPERIMENT, "cpu", finished.output, seeds=(0, 1), jobs=1, remeasure=True, progress=False)
    assert losses(measured) == losses(finished)


def test_another_run_in_the_same_folder_is_refused(finished: Reproduction):
    with pytest.raises(CheckpointError, match=r"belongs to another run: train\.learning_rate"):
        reproduce(
            EXPERIMENT,
            "cpu",
            finished.output,
            overrides=["train.learning_rate=0.5"],
            seeds=(0,),
            jobs=1,
            progress=False,
        )
    with pytest.raises(TrainingError, match="was trained for 6 steps, which is more than the 2 of this run"):
        reproduce(EXPERIMENT, "cpu", finished.output, overrides=["train.steps=2"], seeds=(0,), jobs=1, progress=False)


def test_damaged_results_are_named(finished: Reproduction, output: Path):
    shutil.copytree(finished.output / "seed-0", output / "seed-0")
    (output / "seed-0" / "dense" / RESULT_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"dense/result\.json is damaged"):
        reproduce(EXPERIMENT, "cpu", output, seeds=(0,), progress=False)


@pytest.mark.parametrize("seeds", [(), (0, 0), (-1,)])
def test_bad_seeds(seeds: tuple[int, ...], tmp_path: Path):
    with pytest.raises(ConfigError, match="is not a list of different seeds"):
        reproduce(EXPERIMENT, "cpu", tmp_path / "out", seeds=seeds, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_bad_field_of_any_arm_is_found_before_any_work(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"arms\.forked\.train\.steps"):
        reproduce(EXPERIMENT, "cpu", tmp_path / "out", overrides=["arms.forked.train.steps=-1"], progress=False)
    assert not (tmp_path / "out").exists()


def test_processes_side_by_side_stop_with_checkpoints(output: Path, monkeypatch: pytest.MonkeyPatch):
    update = Display.update

    def interrupting(display: Display, running):
        if running and all(task.steps_made >= 3 for task in running):
            signal.raise_signal(signal.SIGTERM)
            monkeypatch.setattr(Display, "update", update)

    monkeypatch.setattr(Display, "update", interrupting)
    slow = [
        "arms.moe.train.steps=5000",
        "arms.dense.train.steps=5000",
        "train.eval_every=null",
        "train.checkpoint_every=null",
    ]
    stopped = reproduce(EXPERIMENT, "cpu", output, seeds=(5,), overrides=slow, jobs=2, progress=False)
    assert (stopped.finished, stopped.results, stopped.exit_code) == (False, {}, 128 + signal.SIGTERM)
    for arm in ("moe", "dense"):
        assert CheckpointStore(output / "seed-5" / arm / "checkpoints", 1).latest() is not None


@pytest.mark.slow
def test_processes_side_by_side_give_the_same_numbers(finished: Reproduction, output: Path):
    found = reproduce(EXPERIMENT, "cpu", output, seeds=(0, 1), jobs=2, progress=False)
    assert found.finished
    assert losses(found) == pytest.approx(losses(finished))


@pytest.mark.slow
def test_an_arm_that_fails_is_named(output: Path):
    folder = output / "seed-0" / "dense"
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    with pytest.raises(TrainingError, match=r"dense, seed 0: .*the same command goes on"):
        reproduce(EXPERIMENT, "cpu", output, seeds=(0,), jobs=2, progress=False)
