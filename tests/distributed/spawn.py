"""Runs a function on every rank of a small world of gloo processes, on this machine."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import queue
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0) -> list[Any]:
    """Results of `function(*arguments)` on ranks 0 to world - 1, in order.

    Children come from a fork server that has imported everything, so that a world starts in a fraction of a second.
    `function` must be importable; inside it torch.distributed is started.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or if some did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, world, folder, answers, function, arguments), daemon=True)
            for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        try:
            return _collect(ranks, answers, time.monotonic() + timeout)
        finally:
            for rank in ranks:
                if rank.is_alive():
                    rank.kill()
                rank.join()


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


def _rank(
    rank: int, world: int, folder: str, answers: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    failure = result = None
    try:
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
    # As bytes: a queue of multiprocessing would hand over file descriptors of tensors, which end with this process.
    answers.put((rank, failure, pickle.dumps(result)))
    answers.close()
    answers.join_thread()
    # The parent ends all ranks together: one that closes its connections early resets those of ranks still reading.
    threading.Event().wait()
