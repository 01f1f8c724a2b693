"""Which parts of a whole tensor each process holds, for every way in which tensors are spread."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard


@dataclass(frozen=True)
class Box:
    """A range of indices in each dimension of a tensor.

    Attributes:
        start: first index.
        size: extents.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers are in it."""
        return math.prod(self.size)

    def overlap(self, other: Box) -> Box | None:
        """What both have in common, or None."""
        start = tuple(map(max, self.start, other.start))
        ends = (
            min(a + n, b + m) for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True)
        )
        size = tuple(end - first for end, first in zip(ends, start, strict=True))
        return Box(start, size) if all(length > 0 for length in size) else None


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor that a process holds.

    Attributes:
        box: in the whole tensor.
        place: where it starts in the process's local tensor.
    """

    box: Box
    place: tuple[int, ...]

    def part(self, local: Tensor, box: Box) -> Tensor:
        """View of the local tensor on a box inside this piece."""
        for dimension, (first, length) in enumerate(zip(box.start, box.size, strict=True)):
            local = local.narrow(dimension, self.place[dimension] + first - self.box.start[dimension], length)
        return local


@dataclass(frozen=True)
class Spread:
    """How a tensor is spread over all processes.

    Attributes:
        shape: of the whole tensor.
        placements: by mesh axis; empty where every process holds all of it.
        sizes: of the mesh axes.
        ranks: of the mesh, in its order.
    """

    shape: tuple[int, ...]
    placements: tuple[Placement, ...] = ()
    sizes: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensor: Tensor) -> Spread:
        """The spread of a tensor; one that is no DTensor counts as equal on all processes."""
        if not isinstance(tensor, DTensor):
            return cls(tuple(tensor.shape))
        mesh = tensor.device_mesh.mesh
        return cls(tuple(tensor.shape), tuple(tensor.placements), tuple(mesh.shape), tuple(mesh.flatten().tolist()))

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """What a process holds, in the order of its local tensor. Processes with the same pieces hold the same numbers."""
        ranges = [[(0, length)] for length in self.shape]
        if self.placements:
            if rank not in self.ranks:
                return ()
            coordinate, place = [], self.ranks.index(rank)
            for size in reversed(self.sizes):
                place, here = divmod(place, size)
                coordinate.insert(0, here)
            for placement, count, here in zip(self.placements, self.sizes, coordinate, strict=True):
                if isinstance(placement, Replicate):
                    continue
                if not isinstance(placement, Shard | _StridedShard):
                    raise TypeError(f"a tensor with placement {placement} has no parts that could be stored")
                blocks = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
                ranges[placement.dim] = list(_chunk(ranges[placement.dim], blocks, count, here))
        placed = [list(_with_places(found)) for found in ranges]
        return tuple(
            Piece(Box(tuple(r[0] for r in corner), tuple(r[1] for r in corner)), tuple(r[2] for r in corner))
            for corner in itertools.product(*placed)
        )


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _chunk(ranges: Sequence[tuple[int, int]], blocks: int, count: int, here: int) -> Iterator[tuple[int, int]]:
    """Ranges of one of `count` parts: of each of `blocks` equal blocks the part that `torch.chunk` would give."""
    total = sum(length for _, length in ranges)
    if total % blocks:
        raise ValueError(f"{total} indices are not {blocks} equal blocks")
    block = total // blocks
    chunk = -(-block // count)
    for index in range(blocks):
        first = index * block + min(block, here * chunk)
        last = index * block + min(block, (here + 1) * chunk)
        position = 0
        for start, length in ranges:
            low, high = max(first, position), min(last, position + length)
            if low < high:
                yield start + low - position, high - low
            position += length


def _with_places(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(start, length, place in the local tensor), neighbours joined."""
    place, joined = 0, []
    for start, length in ranges:
        if joined and joined[-1][0] + joined[-1][1] == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + length, joined[-1][2])
        else:
            joined.append((start, length, place))
        place += length
    return iter(joined)


