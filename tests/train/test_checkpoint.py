from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
from tests.train.builders import tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.errors import CheckpointError, TrainingError
from moesaic.hf.weight_files import WeightFile
from moesaic.train import CheckpointStore, RunConfig, check_same_run, load_state, train
from moesaic.train.checkpoint import STATE_FILE

OPTIMIZER_FILE, METADATA_FILE = "optimizer/__0_0.distcp", "optimizer/.metadata"


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    train(tiny_run(data.config), output, data=data, progress=False)
    return output


@pytest.fixture
def output(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def changed(run: RunConfig, section: str, **values) -> RunConfig:
    whole = run.to_dict()
    return RunConfig.from_dict({**whole, section: {**whole[section], **values}})


def test_a_checkpoint_is_a_whole_hf_model(trained, data):
    latest = CheckpointStore(trained / "checkpoints", 2).latest()
    assert latest is not None
    assert latest.name == "step-00000008"
    assert AutoModelForCausalLM.from_pretrained(latest).config.model_type == "moesaic"
    assert len(AutoTokenizer.from_pretrained(latest)) == len(data.tokenizer)
    check_same_run(latest, tiny_run(data.config))


def test_only_the_latest_are_kept(data, tmp_path):
    train(tiny_run(data.config, checkpoint_every=2), tmp_path, data=data, progress=False)
    assert [path.name for path in CheckpointStore(tmp_path / "checkpoints", 2).all()] == [
        "step-00000006",
        "step-00000008",
    ]


def test_chosen_steps_are_kept_besides(data, tmp_path):
    run = tiny_run(data.config, checkpoint_every=2, keep_checkpoints=1, checkpoint_steps=(0, 3, 4))
    train(run, tmp_path, data=data, progress=False)
    steps = [int(path.name[-8:]) for path in CheckpointStore(tmp_path / "checkpoints", 1).all()]
    assert steps == [0, 3, 4, 8]


def test_a_run_goes_on_from_the_untrained_model(data, tmp_path):
    run = tiny_run(data.config, checkpoint_steps=(0,))
    expected = train(run, tmp_path / "whole", data=data, progress=False)
    checkpoints = tmp_path / "again" / "checkpoints"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-00000000", checkpoints / "step-00000000")
    found = train(run, tmp_path / "again", data=data, resume=True, progress=False)
    assert found.validation == expected.validation


def test_what_a_killed_process_left_half_written_is_ignored_and_removed(make_trainer, data, tmp_path):
    trainer = make_trainer(tiny_run(data.config))
    leftover = tmp_path / "checkpoints" / ".step-00000009.abc.tmp"
    leftover.mkdir(parents=True)
    assert trainer.store.latest() is None
    trainer.save()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000000"]


@pytest.mark.parametrize(
    ("section", "values", "field"),
    [
        ("train", {"learning_rate": 0.5}, r"train\.learning_rate is 0\.001 there and 0\.5 here"),
        ("train", {"schedule": {"type": "constant"}}, r"train\.schedule\.type is 'cosine' there and 'constant' here"),
        ("backbone", {"hidden_size": 64}, r"backbone\.hidden_size is 32 there and 64 here"),
        ("moe", {"router": {"type": "top_k", "top_k": 1}}, r"moe\.router\.top_k is 2 there and 1 here"),
        ("data", {"batch_size": 2}, r"data\.batch_size is 4 there and 2 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_field(trained, data, section, values, field):
    run = changed(tiny_run(data.config), section, **values)
    with pytest.raises(CheckpointError, match=f"belongs to another run: {field}; restore the value"):
        train(run, trained, resume=True, data=data, progress=False)


def test_a_dense_run_does_not_resume_an_moe_run(trained, data):
    with pytest.raises(CheckpointError, match=r"belongs to another run: moe is .* there and None here"):
        train(tiny_run(data.config, moe=False), trained, resume=True, data=data, progress=False)


def test_a_longer_run_with_other_reporting_goes_on(output, data):
    run = tiny_run(data.config, steps=10, log_every=3, eval_every=None, keep_checkpoints=1)
    assert train(run, output, resume=True, data=data, progress=False).step == 10


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-9]), r"model\.safetensors is damaged"),
        ("model.safetensors", Path.unlink, r"model\.safetensors is missing"),
        (OPTIMIZER_FILE, lambda path: path.write_bytes(path.read_bytes()[:-9]), r"optimizer/__0_0\.distcp is damaged"),
        (OPTIMIZER_FILE, lambda path: path.write_bytes(bytes(path.stat().st_size)), r"__0_0\.distcp is damaged"),
        (OPTIMIZER_FILE, Path.unlink, r"__0_0\.distcp is missing"),
        (METADATA_FILE, lambda path: path.write_bytes(path.read_bytes()[:-9]), r"optimizer/\.metadata is damaged"),
        (METADATA_FILE, Path.unlink, r"\.metadata is missing"),
        (STATE_FILE, lambda path: path.write_bytes(path.read_bytes()[:999]), r"trainer_state\.pt is damaged"),
        (STATE_FILE, Path.unlink, r"trainer_state\.pt is missing"),
        ("run.yaml", Path.unlink, r"run\.yaml can't be read"),
        ("config.json", lambda path: path.write_text("{"), "cannot load the model"),
    ],
)
def test_a_damaged_checkpoint_is_named(output, data, file, damage, message):
    damage(output / "checkpoints" / "step-00000008" / file)
    with pytest.raises(CheckpointError, match=message):
        train(tiny_run(data.config), output, resume=True, data=data, progress=False)


class _Touch:
    """What a pickle that runs code is made of."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_no_code_from_a_checkpoint_is_run(output, data, tmp_path):
    file = output / "checkpoints" / "step-00000008" / METADATA_FILE
    file.write_bytes(pickle.dumps(_Touch(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged \(posix\.mkdir does not belong into metadata"):
        train(tiny_run(data.config), output, resume=True, data=data, progress=False)
    assert not (tmp_path / "ran").exists()


def test_state_holds_plain_data_only(trained):
    state = load_state(trained / "checkpoints" / "step-00000008")
    assert (state["step"], state["tokens"]) == (8, 8 * 4 * 32)
    assert "rng" not in state  # random numbers follow from seed, step and rank


def test_a_full_disk_leaves_the_previous_checkpoint(data, tmp_path, monkeypatch):
    add = WeightFile.add

    def full_at_the_second(file, name, tensor):
        if (tmp_path / "checkpoints" / "step-00000004").exists() and name == "lm_head.weight":
            raise OSError(errno.ENOSPC, "No space left on device")
        add(file, name, tensor)

    run = tiny_run(data.config)
    monkeypatch.setattr(WeightFile, "add", full_at_the_second)
    with pytest.raises(CheckpointError, match=r"step-00000008: No space left on device; .*step-00000004, is intact"):
        train(run, tmp_path, data=data, progress=False)
    monkeypatch.undo()

    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    assert train(run, tmp_path, resume=True, data=data, progress=False).finished


@pytest.mark.parametrize("file", ["model.safetensors", OPTIMIZER_FILE])
def test_writers_that_really_fail_leave_the_previous_checkpoint(data, make_trainer, file):
    trainer = make_trainer(tiny_run(data.config))
    trainer.train_step()
    first = trainer.save()
    trainer.train_step()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((first / file).stat().st_size - 1, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*step-00000002: .*step-00000001, is"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in first.parent.iterdir()] == ["step-00000001"]
    assert load_state(first)["step"] == 1


def test_a_folder_with_checkpoints_is_not_overwritten(trained, data):
    with pytest.raises(TrainingError, match="belongs to an earlier run; resume it"):
        train(tiny_run(data.config), trained, data=data, progress=False)


def test_resuming_needs_a_checkpoint(data, tmp_path):
    with pytest.raises(TrainingError, match=r"there is no checkpoint in .* to resume from"):
        train(tiny_run(data.config), tmp_path, resume=True, data=data, progress=False)
