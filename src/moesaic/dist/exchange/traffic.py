"""Counts what a rank sends to others, and how long it waits for them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


def ranks_per_node() -> int:
    """Consecutive ranks that share a node: torchrun's LOCAL_WORLD_SIZE; without that variable, all ranks."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or dist.get_world_size()


@dataclass
class TrafficCount:
    """What one rank sent in the exchanges of tokens, forward and backward; what stays on the rank is not counted.

    Attributes:
        bytes: sent to other ranks.
        bytes_between_nodes: those of them that went to another node.
        messages: sent to other ranks; an exchange is one message for each rank that gets something.
        messages_between_nodes: those of them that went to another node.
        seconds: time in which this rank did nothing but wait for an exchange; on an accelerator, its stream.
    """

    bytes: int = 0
    bytes_between_nodes: int = 0
    messages: int = 0
    messages_between_nodes: int = 0
    seconds: float = 0.0


@dataclass(eq=False)
class Traffic:
    """The counts since they were last taken.

    Args:
        per_node: consecutive ranks that share a node; `ranks_per_node()` if None.
    """

    per_node: int | None = None
    _count: TrafficCount = field(default_factory=TrafficCount, repr=False)
    _waits: list[tuple[torch.Event, torch.Event]] = field(default_factory=list, repr=False)

    def take(self) -> TrafficCount:
        """The counts, which start again at 0; waits for an accelerator that has not finished the last exchange."""
        count, self._count = self._count, TrafficCount()
        waits, self._waits = self._waits, []
        for before, after in waits:
            after.synchronize()
            count.seconds += before.elapsed_time(after) / 1000
        return count

    def add(self, group: dist.ProcessGroup, bytes_P: Sequence[int]) -> None:
        """Count one exchange, from the bytes that go to each rank of a group."""
        rank = dist.get_rank()
        per_node = self.per_node or ranks_per_node()
        for peer, sent in zip(dist.get_process_group_ranks(group), bytes_P, strict=True):
            if peer == rank or sent == 0:
                continue
            self._count.bytes += sent
            self._count.messages += 1
            if peer // per_node != rank // per_node:
                self._count.bytes_between_nodes += sent
                self._count.messages_between_nodes += 1

    @contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Count the time that the block takes, on the device's own clock where it has one."""
        if device.type == "cpu":
            start = time.perf_counter()
            yield
            self._count.seconds += time.perf_counter() - start
            return
        before, after = (torch.Event(device, enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        self._waits.append((before, after))
