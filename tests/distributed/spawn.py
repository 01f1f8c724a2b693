"""Runs a function on every rank of a small world of gloo processes, on this machine."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0) -> list[Any]:
    """Results of `function(*arguments)` on ranks 0 to world - 1, in order, in new processes.

    `function` must be importable; inside it torch.distributed is started.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or if some did not end in time.
    """
    with Ranks(world) as ranks:
        return ranks.run(function, *arguments, timeout=timeout)


class Ranks:
    """Ranks 0 to world - 1, waiting for functions to run.

    They come from a fork server that has imported everything, so that a world starts in a fraction of a second.
    """

    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.preload"])
        self._answers = context.Queue()
        self._tasks = [context.SimpleQueue() for _ in range(world)]
        self._folder = tempfile.TemporaryDirectory()
        self._processes = [
            context.Process(target=_rank, args=(rank, world, self._folder.name, tasks, self._answers), daemon=True)
            for rank, tasks in enumerate(self._tasks)
        ]
        for process in self._processes:
            process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0) -> list[Any]:
        """What `run_ranks` gives; after an error these ranks are of no use any more."""
        # As bytes: a queue of multiprocessing would hand over file descriptors of tensors, which end with their process.
        task = pickle.dumps((function, arguments))
        for tasks in self._tasks:
            tasks.put(task)
        return _collect(self._processes, self._answers, time.monotonic() + timeout)

    def end(self) -> None:
        # All together: one that closes its connections early resets those of ranks still reading.
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


class Worlds:
    """`run_ranks` for functions that leave nothing behind in their processes: these stay for the next function.

    Args:
        uses: of the same processes. Every process group that a function makes stays open in them.
    """

    def __init__(self, uses: int = 20) -> None:
        self._uses = uses
        self._open: dict[int, tuple[Ranks, int]] = {}

    def __call__(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        ranks, used = self._open.pop(world, None) or (Ranks(world), 0)
        try:
            results = ranks.run(function, *arguments)
        except BaseException:
            ranks.end()
            raise
        if used + 1 < self._uses:
            self._open[world] = ranks, used + 1
        else:
            ranks.end()
        return results

    def end(self) -> None:
        while self._open:
            self._open.popitem()[1][0].end()


def _collect(ranks: list[Any], answers: Any, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        try:
            rank, failure, result = answers.get(timeout=0.2)
        except queue.Empty:
            dead = [index for index, rank in enumerate(ranks) if not rank.is_alive() and index not in results]
            # What a rank wrote last may still be on its way.
            if dead and answers.empty():
                codes = [ranks[index].exitcode for index in dead]
                raise AssertionError(f"ranks {dead} ended without an answer, exit codes {codes}") from None
            missing = sorted(set(range(len(ranks))) - set(results))
            assert time.monotonic() < deadline, f"ranks {missing} did not end in time"
            continue
        if failure is not None:
            # The first to say so may only have lost its connection to the one that failed.
            failures = {rank: failure, **_more(answers)}
            raise AssertionError("\n".join(f"rank {rank} failed:\n{text}" for rank, text in sorted(failures.items())))
        results[rank] = pickle.loads(result)
    return [results[rank] for rank in range(len(ranks))]


def _more(answers: Any) -> dict[int, str]:
    """Failures of other ranks that come within a moment."""
    failures: dict[int, str] = {}
    try:
        while True:
            rank, failure, _ = answers.get(timeout=1.0)
            if failure is not None:
                failures[rank] = failure
    except queue.Empty:
        return failures


def _rank(rank: int, world: int, folder: str, tasks: Any, answers: Any) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    while True:
        failure = result = None
        try:
            function, arguments = pickle.loads(tasks.get())
            if not dist.is_initialized():
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{Path(folder) / 'store'}",
                    rank=rank,
                    world_size=world,
                    timeout=timedelta(seconds=30),
                )
            result = function(*arguments)
        except BaseException:
            failure = traceback.format_exc()
        answers.put((rank, failure, pickle.dumps(result)))
        del result
