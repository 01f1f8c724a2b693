"""A save that fails on one process fails on all, with one reason, and leaves what was there before."""

from __future__ import annotations

import errno
import os
import resource
import threading
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from tests.distributed.spawn import run_ranks
from tests.distributed.test_checkpoint import Run
from tests.train.builders import data_config, tiny_run, write_corpus

from moesaic.data import PreparedData, prepare_data
from moesaic.errors import CheckpointError
from moesaic.hf.weight_files import WeightFile
from moesaic.train import CheckpointStore, RunConfig, train
from moesaic.train.checkpoint import load_optimizer_state
from moesaic.train.load import load_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return prepare_data(data_config(folder), folder / "cache", progress=False)


def save(run: Run, store: CheckpointStore, step: int, data: PreparedData) -> Path:
    return store.save(step, run.module, run.optimizer, data.tokenizer, tiny_run(data.config), {"tokens": 0})


def _disk_is_full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _dies(*_: Any) -> None:
    os._exit(9)


def _limit_files(*_: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def second_save_fails(folder: Path, data: PreparedData, how: str, in_background: bool) -> str | None:
    run = Run({"ep": 2})
    store = CheckpointStore(folder, 2, in_background=in_background)
    save(run, store, 1, data)
    store.wait()
    if dist.get_rank() == 1:
        if how == "optimizer":
            # A real limit: 20 kB is room for the weights of a process, not for its part of the optimiser.
            _limit_files()
        else:
            WeightFile.add = cast(Any, {"full": _disk_is_full, "dies": _dies}[how])
    try:
        save(run, store, 2, data)
        # In the background, the error waits for the next point at which all processes are.
        assert in_background
        store.wait()
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("how", ["full", "optimizer"])
def test_all_fail_with_one_reason(data: PreparedData, tmp_path: Path, how: str, in_background: bool) -> None:
    messages = run_ranks(2, second_save_fails, tmp_path, data, how, in_background)
    assert messages[0] is not None
    assert set(messages) == {messages[0]}
    assert "step-00000002" in messages[0]
    assert "(process 1 of 2)" in messages[0]
    assert f"the last checkpoint, {tmp_path / 'step-00000001'}, is intact" in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_process_that_dies_in_a_save_leaves_earlier_ones(data: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ranks \[1\] ended without an answer|Connection closed by peer"):
        run_ranks(2, second_save_fails, tmp_path, data, "dies", False)
    store = CheckpointStore(tmp_path, 2)
    assert [path.name for path in store.all()] == ["step-00000001"]
    assert load_model(tmp_path / "step-00000001")
    # What it left is removed with the next one.
    save(Run(None), store, 3, data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_training_goes_on_while_a_checkpoint_is_written(data: PreparedData, tmp_path: Path, monkeypatch: Any) -> None:
    run, store = Run(None), CheckpointStore(tmp_path, 2, in_background=True)
    ids_BS = torch.randint(61, (8, 12), generator=torch.Generator().manual_seed(0))
    run.step(ids_BS)
    before = {name: tensor.clone() for name, tensor in run.module.state_dict().items()}
    moments = {key: state["exp_avg"].clone() for key, state in run.optimizer.state.items()}
    stepped, add = threading.Event(), WeightFile.add

    def add_after_the_step(*arguments: Any) -> None:
        assert stepped.wait(20)
        add(*arguments)

    monkeypatch.setattr(WeightFile, "add", add_after_the_step)
    path = save(run, store, 1, data)
    run.step(ids_BS)
    assert not path.exists()
    stepped.set()
    store.wait()

    loaded = load_model(path)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    load_optimizer_state(path, run.module, run.optimizer)
    for key, state in run.optimizer.state.items():
        assert torch.equal(state["exp_avg"], moments[key])


def trained(run: RunConfig, output: Path, data: PreparedData) -> Path:
    return train(run, output, data=data, progress=False).checkpoint


def test_checkpoints_in_the_background_are_the_same(data: PreparedData, tmp_path: Path) -> None:
    outputs = []
    for asynchronous in (False, True):
        run = tiny_run(data.config, checkpoint_every=3, async_checkpoint=asynchronous)
        run = RunConfig.from_dict({**run.to_dict(), "parallel": {"ep": 2}})
        output = tmp_path / str(asynchronous)
        first, last = (output / "checkpoints" / f"step-{step:08d}" for step in (6, 8))
        assert run_ranks(2, trained, run, output, data) == [last, last]
        assert CheckpointStore(output / "checkpoints", 2).all() == [first, last]
        outputs.append(last)
    files = [{str(file.relative_to(path)) for file in path.rglob("*")} for path in outputs]
    assert files[0] == files[1]
    for file in sorted(name for name in files[0] if name.endswith((".safetensors", ".distcp", ".json"))):
        assert (outputs[0] / file).read_bytes() == (outputs[1] / file).read_bytes(), file
