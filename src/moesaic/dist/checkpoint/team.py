"""The processes that write one folder: they go on together or fail together, and nothing half-written stays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from moesaic.files import atomic_directory


class WriteFailed(Exception):
    """A process could not write its part; every process of the team raises this with the same message."""


class Team:
    """All processes of torch.distributed, or this one where it is not started.

    They talk over a gloo group of their own, so that a thread can do so while training goes on. Making one is a
    collective call.

    Attributes:
        rank: of this process.
        size: number of processes.
        group: their group; None for a process alone.
    """

    def __init__(self) -> None:
        started = dist.is_available() and dist.is_initialized()
        self.group: dist.ProcessGroup | None = cast(Any, dist.new_group(backend="gloo")) if started else None
        self.rank = dist.get_rank() if started else 0
        self.size = dist.get_world_size() if started else 1

    def together(self, step: Callable[[], Any]) -> None:
        """Do one step of the work on every process, and raise on all if it fails on one.

        Raises:
            WriteFailed: with the reason of the first process that failed.
        """
        problem: Exception | None = None
        try:
            step()
        except Exception as error:
            if self.group is None and not isinstance(error, OSError):
                raise
            problem = error
        reasons: list[str | None] = [None] * self.size
        reason = None if problem is None else _reason(problem)
        if self.group is None:
            reasons = [reason]
        else:
            dist.all_gather_object(reasons, reason, group=self.group)
        failed = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
        if failed:
            rank, reason = failed[0]
            raise WriteFailed(reason if self.size == 1 else f"{reason} (process {rank} of {self.size})") from problem

    @contextlib.contextmanager
    def directory(self, path: Path) -> Iterator[Path]:
        """A temporary folder for all processes, which becomes `path` when all have left the context without error.

        What runs inside must fail on every process or on none; `together` sees to that.

        Raises:
            WriteFailed: if the folder can't be made, renamed, or seen by a process.
        """
        with contextlib.ExitStack() as stack:
            made: list[Path] = []
            if self.rank == 0:
                self.together(lambda: made.append(stack.enter_context(atomic_directory(path))))
            else:
                self.together(lambda: None)
            folder = self._of_first(made[0] if made else None)
            self.together(lambda: _check_seen(folder))
            yield folder
            self.together(stack.close)

    def _of_first(self, value: Any) -> Any:
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


def _check_seen(folder: Path) -> None:
    if not folder.is_dir():
        raise OSError(f"{folder} is not there; all processes must share the file system of the output folder")


def _reason(problem: Exception) -> str:
    if isinstance(problem, OSError):
        return problem.strerror or str(problem)
    return f"{type(problem).__name__}: {problem}"
