"""What this machine can do: bytes a second from memory, and FLOPs a second of a large product."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moesaic.bench.device import cache_bytes, synchronise
from moesaic.layer.kernels.native import decode

# A busy moment of the machine must not lower what counts as its best.
REPEATS = 5
LEAST_SECONDS = 0.4


@dataclass(frozen=True)
class Rates:
    """The best that was seen in a moment.

    Attributes:
        bandwidth: bytes a second that a loop over a large buffer reads.
        gemm: FLOPs a second of a square product in the type of the cell.
        bandwidth_by: which loop was the fastest.
    """

    bandwidth: float
    gemm: float
    bandwidth_by: str

    def between(self, other: Rates) -> Rates:
        """The mean of what was measured before and after a comparison."""
        return Rates((self.bandwidth + other.bandwidth) / 2, (self.gemm + other.gemm) / 2, self.bandwidth_by)


def measure_rates(dtype: torch.dtype, device: str, *, quick: bool = False) -> Rates:
    """Measure with the threads that torch has now.

    Args:
        dtype: of the product.
        device: where.
        quick: smaller buffers, for tests and --quick.
    """
    by, bandwidth = max(_bandwidths(device, quick).items(), key=lambda item: item[1])
    return Rates(bandwidth, _gemm(dtype, device, quick), by)


def _bandwidths(device: str, quick: bool) -> dict[str, float]:
    """Bytes a second of each way to read a buffer."""
    count = cache_bytes(device) * (4 if quick else 16) // 4
    buffer = torch.ones(count, device=device)
    readers: dict[str, Callable[[], object]] = {
        "torch sum": lambda: buffer.sum(),
        "torch maximum": lambda: buffer.amax(),
    }
    if torch.device(device).type == "cpu" and decode.available():
        columns = 4096
        matrix, vector = buffer[: count // columns * columns].view(-1, columns), torch.ones(1, columns)
        plan = decode.LinearsPlan([(matrix, None)])
        readers["native matrix times vector"] = lambda: plan(vector)
    size = buffer.numel() * buffer.element_size()
    return {name: size / _best(reader, device) for name, reader in readers.items()}


def _gemm(dtype: torch.dtype, device: str, quick: bool) -> float:
    """FLOPs a second."""
    side = 8192 if torch.device(device).type == "cuda" else 1024 if quick else 2048
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: left @ right.t(), device)


def _best(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of at least five runs and 0.4 seconds, after one to warm up."""
    found: list[float] = []
    while len(found) <= REPEATS or sum(found) < LEAST_SECONDS:
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])
