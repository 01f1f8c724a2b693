"""`moesaic train` in real processes: started by itself and by torchrun, hurt in the middle of a run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.distributed.test_train import numbers, run_of, trained
from tests.train.builders import write_corpus

from moesaic.train import read_metrics

STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of many quick steps, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("launch")
    write_corpus(folder)
    run = run_of(folder, {"timeout_seconds": 20}, steps=STEPS, eval_every=None, checkpoint_every=5)
    (folder / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
    trained(run, folder / "alone", folder / "cache")
    return folder


class Command:
    """A command line under test; whatever it started ends with the test."""

    def __init__(self, folder: Path, output: Path, *launcher: str, options: tuple[str, ...] = ()) -> None:
        self.metrics = output / "metrics.jsonl"
        self.log = output.parent / f"log-{time.monotonic_ns()}.txt"
        train = ["train", str(folder / "run.yaml"), "-o", str(output), "--cache", str(folder / "cache"), *options]
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *launcher, *train],
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def children(self) -> list[int]:
        """Its workers."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in found]

    def until_step(self, step: int) -> None:
        self.until(lambda: any(record["step"] >= step for record in read_metrics(self.metrics)))

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 90
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def end(self, timeout: float = 90) -> tuple[int, str]:
        """Its exit code and all that it printed."""
        code = self.process.wait(timeout)
        return code, self.log.read_text()


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    commands: list[Command] = []

    def begin(*launcher: str, **settings: Any) -> Command:
        commands.append(Command(folder, tmp_path / "run", *launcher, **settings))
        return commands[-1]

    yield begin
    for command in commands:
        # Workers die with their parent.
        command.process.kill()
        command.process.wait()


def alive(process: int) -> bool:
    """Whether a process runs; one that is dead and not yet collected does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(processes: list[int], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while any(alive(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(process) for process in processes)


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0


def assert_same_losses(folder: Path, metrics: Path) -> None:
    found, expected = numbers(metrics), numbers(folder / "alone" / "metrics.jsonl")
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for mine, other in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, abs=2e-5)


def test_a_killed_worker_ends_all_with_one_message_and_the_next_command_goes_on(
    folder: Path, start: Callable[..., Command]
) -> None:
    command = start("moesaic", options=("--nproc", "2"))
    command.until_step(7)
    workers = command.children()
    os.kill(workers[1], signal.SIGKILL)
    code, text = command.end()
    assert code == 128 + signal.SIGKILL
    assert text.count("error:") == 1, text
    assert f"(process {workers[1]}) was ended by SIGKILL" in text
    assert "Traceback" not in text
    assert gone(workers)

    again = start("moesaic", options=("--nproc", "2"))
    again.until_step(12)
    workers = again.children()
    os.kill(again.process.pid, signal.SIGTERM)
    code, text = again.end()
    assert code == 128 + signal.SIGTERM, text
    assert "stopped by a signal after step" in text
    assert gone(workers)

    orphaned = start("moesaic", options=("--nproc", "2"))
    orphaned.until_step(25)
    workers = orphaned.children()
    orphaned.process.kill()
    assert gone(workers)


def test_bad_configurations_are_refused_before_anything_starts(start: Callable[..., Command]) -> None:
    code, text = start("moesaic", options=("--nproc", "2", "--set", "parallel.ep=3")).end()
    assert code == 2
    assert "parallel.ep = 3 does not divide the 2 processes; choose from [1, 2]" in " ".join(text.split())


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker_at_the_same_size(folder: Path, start: Callable[..., Command]) -> None:
    command = start("torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "moesaic")
    command.until_step(12)
    os.kill(command.children()[0], signal.SIGKILL)
    code, text = command.end()
    assert code == 0, text
    assert_same_losses(folder, command.metrics)


def sizes(command: Command) -> list[tuple[int, int]]:
    """Each step with the number of processes that made it."""
    records = read_metrics(command.metrics)
    return [(record["step"], record["ranks"]["processes"]) for record in records if record["type"] == "train"]


def test_a_lost_host_leaves_the_rest_to_go_on(folder: Path, start: Callable[..., Command]) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    agent = [
        "torch.distributed.run",
        "--nnodes=1:2",
        "--nproc-per-node=1",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{port}",
        "--rdzv-conf=last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=2",
        "-m",
        "moesaic",
    ]
    stays = start(*agent)
    # The agent that holds the rendezvous must not be the one that is lost.
    stays.until(lambda: answers(port))
    lost = start(*agent)
    stays.until(lambda: any(count == 2 and step >= 12 for step, count in sizes(stays)))
    worker = lost.children()
    os.kill(lost.process.pid, signal.SIGKILL)
    for process in worker:
        os.kill(process, signal.SIGKILL)
    code, text = stays.end()
    assert code == 0, text
    assert sizes(stays)[-1] == (STEPS, 1)
    assert_same_losses(folder, stays.metrics)
