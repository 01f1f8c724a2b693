"""Processes that train arms side by side, one thread each, and stop as cleanly as one run does.

Each has its own process group, so that Ctrl-C reaches only the parent, which passes it on once: a second signal would
end a run without a checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Self

import torch
from transformers.utils import logging as transformers_logging

from moesaic.errors import MoesaicError
from moesaic.papers.result import ArmResult, Task, perform


@dataclass(frozen=True)
class Outcome:
    """How a task ended: with a result, stopped by a signal (neither), or with an error.

    Attributes:
        task: which.
        result: its numbers.
        error: what went wrong, for a person.
    """

    task: Task
    result: ArmResult | None = None
    error: str | None = None


class Workers:
    """A fixed number of processes; use it as a context manager.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        context = get_context("spawn")  # forking a process that has threads of torch may hang
        self._processes, self._connections = [], []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._running: dict[int, Task] = {}
        self._ready: set[int] = set()
        self._interrupted = False

    @property
    def running(self) -> list[Task]:
        """What is being worked on."""
        return list(self._running.values())

    @property
    def idle(self) -> bool:
        """Whether a process waits for work."""
        return len(self._running) < len(self._processes)

    def start(self, task: Task) -> None:
        """Give `task` to a process that waits."""
        index = next(index for index in range(len(self._processes)) if index not in self._running)
        self._connections[index].send(task)
        self._running[index] = task

    def outcomes(self, timeout: float) -> Iterator[Outcome]:
        """What has ended, after waiting at most `timeout` seconds for the first."""
        connections = {id(self._connections[index]): index for index in self._running}
        for ready in wait([self._connections[index] for index in self._running], timeout):
            index = connections[id(ready)]
            try:
                outcome = self._connections[index].recv()
            except EOFError:
                outcome = self._death(index)
            if outcome is None:  # the process has come up
                self._ready.add(index)
            else:
                del self._running[index]
                yield outcome

    def interrupt(self) -> None:
        """Ask all running tasks to stop with a checkpoint."""
        self._interrupted = True
        for index in self._running:
            process = self._processes[index]
            if index not in self._ready:  # it is still importing: nothing is lost, and nothing there would listen
                process.terminate()
            elif process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGINT)

    def _death(self, index: int) -> Outcome:
        """What a process that died leaves of its task."""
        task, process = self._running[index], self._processes[index]
        process.join()
        if self._interrupted:
            return Outcome(task)
        return Outcome(task, error=f"its process died (exit code {process.exitcode}; -9 is mostly a lack of memory)")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=0.0 if kind else 10.0)
            if process.is_alive():
                process.terminate()
                process.join()


def _work(connection: Connection) -> None:
    """Perform tasks until the parent hangs up."""
    os.setpgrp()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        connection.send(None)
        while True:
            task = connection.recv()
            connection.send(_outcome(task))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def _follow_parent() -> None:
    """Stop with a checkpoint when the parent is gone, however it went."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGINT)


def _outcome(task: Task) -> Outcome:
    try:
        return Outcome(task, perform(task)[0])
    except KeyboardInterrupt:  # before or after the steps, where nothing is lost
        return Outcome(task)
    except (MoesaicError, OSError) as error:
        return Outcome(task, error=str(error))
    except Exception:
        return Outcome(task, error=traceback.format_exc())
