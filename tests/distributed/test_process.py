"""Who a process is, how those that start agree, and what is said of one that is lost."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tests.distributed.spawn import run_ranks
from tests.train.builders import data_config, tiny_run
from torch.distributed import HashStore

from moesaic.dist import ParallelConfig
from moesaic.dist.launch import seconds_to_wait
from moesaic.dist.process import LostPeer, Meeting, Process, _generation, naming_lost_peers
from moesaic.errors import ConfigError
from moesaic.train.ranks import check_parallel, rank_violation

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_the_environment_says_who_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert Process.of_environment() == Process()
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    found = Process.of_environment()
    assert found == Process(rank=5, world=8, local_rank=1, local_world=4, distributed=True)
    assert not found.is_first
    assert not found.is_first_on_host


def test_one_of_several_processes_shows_an_error_first() -> None:
    processes = [Process(rank, 2, rank, 2, True) for rank in range(2)]
    waits = [seconds_to_wait(process, lost_peer=lost) for lost in (False, True) for process in processes]
    assert waits[0] == 0
    assert 0 < waits[1] <= waits[2] < waits[3]


@pytest.mark.parametrize("stale", [False, True])
def test_processes_that_start_agree_whatever_ended_ones_left(stale: bool) -> None:
    store = HashStore()
    if stale:
        for rank in range(1, 4):
            store.set(f"question/{rank}", "old")
            store.set(f"answer/{rank}", "old generation")
            store.set(f"heard/{rank}", "generation")
    names: dict[int, str] = {}

    def start(rank: int) -> None:
        names[rank] = _generation(Process(rank, 4, rank, 4, True), store, 20)

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(names) == 4
    assert len(set(names.values())) == 1
    assert names[0] != "generation"


def test_those_that_did_not_start_are_named() -> None:
    with pytest.raises(LostPeer, match=r"rank 0: ranks \[1, 2\] did not start"):
        _generation(Process(0, 3, 0, 3, True), HashStore(), 0)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/a/gloo/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"), True),
        (RuntimeError("Timed out waiting 5000ms for recv operation to complete"), True),
        (torch.distributed.DistNetworkError("anything"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_errors_of_collectives_name_rank_step_and_limit(error: Exception, lost: bool) -> None:
    def fail(process: Process) -> None:
        with naming_lost_peers(process, lambda: "after step 7", "parallel.timeout_seconds = 5"):
            raise error

    with pytest.raises(type(error)) as kept:
        fail(Process())  # one alone has no peers
    assert kept.value is error
    with pytest.raises(LostPeer if lost else type(error)) as found:
        fail(Process(3, 4, 3, 4, True))
    if lost:
        assert str(found.value).startswith("rank 3, after step 7: another process has ended, hangs")
        assert "parallel.timeout_seconds = 5" in str(found.value)
        assert "/a/gloo" not in str(found.value)


def one_leaves_the_others_waiting() -> str:
    process = Process.of_environment()
    meeting = Meeting(process)
    meeting.limit_collectives(0.5)
    meeting.wait()
    try:
        with naming_lost_peers(process, lambda: "after step 2", "parallel.timeout_seconds = 0.5"):
            if process.rank != 1:
                torch.distributed.all_reduce(torch.zeros(3))
    except LostPeer as lost:
        return str(lost)
    finally:
        meeting.wait()  # without a limit: rank 1 is here long before
    return ""


def test_a_peer_that_does_not_answer_is_an_error_after_the_limit() -> None:
    first, second = run_ranks(2, one_leaves_the_others_waiting)
    assert "rank 0, after step 2" in first
    assert "0.5" in first
    assert second == ""


@pytest.mark.parametrize(
    ("world", "changes", "message"),
    [
        (3, {}, r"data\.batch_size = 4 cannot be shared by 3 processes; choose a multiple of 3"),
        (4, {"parallel": {"dp_shard": 3}}, r"parallel\.dp_shard = 3 .* is not the number of processes \(4\)"),
        (4, {"parallel": {"ep": 3}}, r"parallel\.ep = 3 does not divide the 4 processes; choose from \[1, 2, 4\]"),
        (2, {"compile": True}, r"train\.compile = True is not possible over several processes; set it to false"),
    ],
)
def test_what_does_not_fit_the_processes_is_refused(tmp_path: Any, world: int, changes: dict, message: str) -> None:
    parallel = ParallelConfig.from_dict(changes.pop("parallel", {}))
    run = tiny_run(data_config(tmp_path), **changes).model_copy(update={"parallel": parallel})
    with pytest.raises(ConfigError, match=message):
        check_parallel(run, Process(0, world, 0, world, True))
    assert check_parallel(run, Process()) is None


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:1", "is one device for several processes"), ("mps", "has no collectives"), ("cuda", "has 1 GPUs for 2")],
)
def test_devices_that_processes_cannot_share_out(monkeypatch: pytest.MonkeyPatch, device: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    process = Process(1, 2, 1, 2, True)
    with pytest.raises(ConfigError, match=message):
        process.device(torch.device(device))
    assert process.device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert process.device(torch.device("cuda")) == torch.device("cuda:1")


def test_violation_by_rank_compares_the_loads_of_equal_parts() -> None:
    load_N = torch.tensor([3, 1, 0, 0])
    assert rank_violation(load_N, 2) == pytest.approx(1.0)
    assert rank_violation(load_N, 4) == pytest.approx(2.0)
    assert rank_violation(torch.ones(4), 2) == 0
    assert rank_violation(torch.zeros(4), 2) == 0
