"""This process among those that train together: who it is, and starting and ending torch.distributed."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from moesaic.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)

# Work that one process does while others wait (tokenising a corpus) takes as long as it takes; the launcher ends those
# that wait if it fails.
_PATIENT = timedelta(days=30)
# gloo raises plain RuntimeErrors, which only their text tells from others.
_LOST_PEER = re.compile(r"gloo|connection (closed|reset|refused)|timed out|NCCL|remote process|broken pipe", re.IGNORECASE)
# Where in torch's or gloo's sources an error was found.
_PLACE = re.compile(r"\[[^\]]*\.cc:\d+\] *")
# Processes start at different times: imports from a busy network file system take minutes.
_CONNECT_SECONDS = 900.0
_POLL_SECONDS = 0.02
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Process:
    """One of the processes of a job. Alone by default.

    Attributes:
        rank: 0 to world - 1; rank 0 reports for all.
        world: number of processes.
        local_rank: rank on this host.
        local_world: number of processes on this host.
        distributed: whether torch.distributed connects them; also a single process can be started so.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    distributed: bool = False

    @classmethod
    def of_environment(cls) -> Process:
        """What torchrun (or another launcher that sets RANK and WORLD_SIZE) says; alone without it."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return cls(
            rank=rank,
            world=world,
            local_rank=int(os.environ.get("LOCAL_RANK", rank)),
            local_world=int(os.environ.get("LOCAL_WORLD_SIZE", world)),
            distributed=True,
        )

    @property
    def is_first(self) -> bool:
        """Whether it reports for all."""
        return self.rank == 0

    @property
    def is_first_on_host(self) -> bool:
        """Whether it prepares files for the processes of its host."""
        return self.local_rank == 0

    def device(self, device: torch.device) -> torch.device:
        """The device of this process, from the kind that the run asks for.

        Raises:
            ConfigError: if processes can't share it out.
        """
        if not self.distributed or device.type == "cpu":
            return device
        if device.type != "cuda":
            raise ConfigError(
                "train.device", str(device), "has no collectives between processes", "use cpu or cuda, or one process"
            )
        count = torch.cuda.device_count()
        if device.index is not None and self.local_world > 1:
            raise ConfigError("train.device", str(device), "is one device for several processes", "use cuda")
        if self.local_world > count:
            raise ConfigError(
                "train.device", str(device), f"has {count} GPUs for {self.local_world} processes", f"start {count}"
            )
        return torch.device("cuda", self.local_rank)


@contextlib.contextmanager
def process_group(process: Process, device: torch.device) -> Iterator[None]:
    """Connect the processes while entered; does nothing for one alone, or if torch.distributed has been started already.

    After an error the group is left as it is: ending it would wait for processes that are gone, or that wait for this one.

    Args:
        process: this one.
        device: what it computes on: gloo connects CPUs, and NCCL beside it GPUs.

    Raises:
        LostPeer: if the others can't be reached.
    """
    if not process.distributed or dist.is_initialized():
        yield
        return
    _end_with_parent()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=_CONNECT_SECONDS)
    with naming_lost_peers(process, lambda: "while connecting", f"{_CONNECT_SECONDS:g} s"):
        store = _own_part(_store_of_job(process, limit), process)
        dist.init_process_group(
            backend, store=store, rank=process.rank, world_size=process.world, timeout=limit
        )
    yield
    dist.destroy_process_group()


@contextlib.contextmanager
def naming_lost_peers(process: Process, when: Callable[[], str], limit: str) -> Iterator[None]:
    """Turn the errors of collectives that another process did not take part in into one that a user can act on.

    Args:
        process: this one.
        when: it happened, asked for then.
        limit: how long a collective may take, and which field says so.

    Raises:
        LostPeer: in their place.
    """
    try:
        yield
    except RuntimeError as error:
        text = _PLACE.sub("", " ".join(str(error).split()))
        if not process.distributed or not (isinstance(error, dist.DistError) or _LOST_PEER.search(text)):
            raise
        raise LostPeer(
            f"rank {process.rank}, {when()}: another process has ended, hangs or can't be reached (no answer within "
            f"{limit}, or its connection closed): {text:.200}"
        ) from error


def _store_of_job(process: Process, limit: timedelta) -> Store:
    """The key-value store that the launcher's variables name."""
    store, _, _ = next(rendezvous("env://", process.rank, process.world, timeout=limit))
    return store


def _own_part(store: Store, process: Process) -> Store:
    return PrefixStore(_generation(process, store), store)


def _generation(process: Process, store: Store, limit_seconds: float = _CONNECT_SECONDS) -> str:
    """A name that only the processes which are starting now know, agreed on over the store of the job.

    The launcher keeps its store when it restarts processes. What ended ones left there, their addresses among it, must
    not be taken for that of new ones. So rank 0 answers the others until each has got an answer to its own question.
    """
    deadline = time.monotonic() + limit_seconds
    if process.rank:
        question = uuid.uuid4().hex
        store.set(f"question/{process.rank}", question)
        while True:
            asked, _, generation = _read(store, f"answer/{process.rank}").partition(" ")
            if asked == question:
                store.set(f"heard/{process.rank}", generation)
                return generation
            _wait_until(deadline, process, [0])
    generation = uuid.uuid4().hex
    waiting = set(range(1, process.world))
    while waiting:
        for rank in sorted(waiting):
            store.set(f"answer/{rank}", f"{_read(store, f'question/{rank}')} {generation}")
        waiting = {rank for rank in waiting if _read(store, f"heard/{rank}") != generation}
        if waiting:
            _wait_until(deadline, process, sorted(waiting))
    return generation


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _wait_until(deadline: float, process: Process, missing: list[int]) -> None:
    if time.monotonic() > deadline:
        raise LostPeer(f"rank {process.rank}: ranks {missing} did not start within {_CONNECT_SECONDS:g} s")
    time.sleep(_POLL_SECONDS)


class LostPeer(TrainingError):
    """Another process of the job did not answer; what happened to it is its own story."""


class Meeting:
    """Lets processes wait for each other without a limit, and agree on what the first one says.

    Args:
        process: this one; alone it never waits.
    """

    def __init__(self, process: Process) -> None:
        self._group = _patient_group() if process.distributed else None

    def wait(self) -> None:
        """Return once all processes are here."""
        if self._group is not None:
            dist.all_reduce(torch.zeros(1), group=self._group)

    def limit_collectives(self, seconds: float) -> None:
        """Let collectives of all groups but this one fail after so many seconds, once preparations are over."""
        if self._group is not None:
            for group in dist.distributed_c10d._world.pg_map:
                if group is not self._group:
                    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def of_first(self, value: Any) -> Any:
        """`value` of rank 0, which must be picklable."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self._group, device=torch.device("cpu"))
        return values[0]


def _patient_group() -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENT))


def share_cores(process: Process) -> None:
    """Give each process of a host its part of the cores, unless OMP_NUM_THREADS says how many."""
    if not process.distributed:
        return
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // process.local_world))
    if process.is_first:
        source = "cores shared out" if given is None else "OMP_NUM_THREADS, which torchrun sets to 1 where it is not set"
        logger.info("%d threads in each of %d processes (%s)", torch.get_num_threads(), process.world, source)


def _end_with_parent() -> None:
    """Have the system kill this process when torchrun's agent, its parent, dies: nothing else would end it."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
