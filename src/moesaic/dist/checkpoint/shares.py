"""Who writes which tensor of a model folder, and how it gets there: no process ever holds more than its share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.dist.checkpoint.boxes import Box, Piece, Spread, local_part
from moesaic.hf.stored import StoredTensor, stored_tensors


@dataclass(frozen=True)
class _Move:
    """A part of a tensor on disk on its way from the process that holds it to the one that writes it."""

    box: Box
    piece: Piece
    sender: int


class Shares:
    """The tensors of a model folder, divided among all processes.

    A tensor is written by a process that holds most of it: experts by those that have them, so that whole experts never
    travel. Among these it is the one with the fewest bytes so far, so that dense tensors even out what experts leave.
    Every process works this out by itself, and all come to the same.

    Args:
        model: whole or sharded; looked at only.
        world: number of processes.

    Attributes:
        stored: all tensors, by name.
        writer: rank of the process that writes each, by name.
    """

    def __init__(self, model: PreTrainedModel, world: int) -> None:
        self.stored = stored_tensors(model)
        self.world = world
        state = model.state_dict()
        self._spread = {entry.source: Spread.of(state[entry.source]) for entry in self.stored}
        self._holders: dict[Spread, dict[tuple[Piece, ...], list[int]]] = {}
        self.writer = self._assigned()

    def of(self, rank: int) -> list[StoredTensor]:
        """What a process writes."""
        return [entry for entry in self.stored if self.writer[entry.name] == rank]

    def _assigned(self) -> dict[str, int]:
        written, writer = [0] * self.world, {}
        most: dict[tuple[Spread, Box], list[int]] = {}
        for entry in sorted(self.stored, key=lambda entry: (-entry.nbytes, entry.name)):
            key = (self._spread[entry.source], Box(entry.start, entry.size))
            if key not in most:
                most[key] = self._with_most(*key)
            rank = min(most[key], key=lambda rank: (written[rank], rank))
            writer[entry.name] = rank
            written[rank] += entry.nbytes
        return writer

    def _with_most(self, spread: Spread, box: Box) -> list[int]:
        held: dict[int, list[int]] = defaultdict(list)
        for pieces, ranks in self._held(spread).items():
            overlaps = (piece.box.overlap(box) for piece in pieces)
            held[sum(overlap.numel for overlap in overlaps if overlap is not None)] += ranks
        return held[max(held)]

    def _held(self, spread: Spread) -> dict[tuple[Piece, ...], list[int]]:
        """The different parts into which a tensor is spread, and who holds each."""
        if spread not in self._holders:
            found: dict[tuple[Piece, ...], list[int]] = defaultdict(list)
            for rank in range(self.world):
                found[spread.pieces(rank)].append(rank)
            self._holders[spread] = dict(found)
        return self._holders[spread]

    def collect(self, model: PreTrainedModel, rank: int) -> Iterator[tuple[StoredTensor, Tensor]]:
        """The tensors that this process writes, one after the other. A collective call of the training's processes.

        Parts of one tensor of the model travel at a time. What needs no travel is a view of the model's own memory.
        """
        by_source: dict[str, list[StoredTensor]] = defaultdict(list)
        for entry in self.stored:
            by_source[entry.source].append(entry)
        state = model.state_dict()
        for source in state:
            if source in by_source:
                yield from self._collect_one(state[source], by_source[source], rank)

    def _moves(self, entry: StoredTensor) -> Iterator[_Move]:
        box, writer = Box(entry.start, entry.size), self.writer[entry.name]
        for pieces, ranks in self._held(self._spread[entry.source]).items():
            # Replicas take turns.
            sender = writer if writer in ranks else ranks[writer % len(ranks)]
            for piece in pieces:
                overlap = piece.box.overlap(box)
                if overlap is not None:
                    yield _Move(overlap, piece, sender)

    def _collect_one(
        self, tensor: Tensor, wanted: Sequence[StoredTensor], rank: int
    ) -> Iterator[tuple[StoredTensor, Tensor]]:
        local = local_part(tensor.detach())
        moves = {entry.name: list(self._moves(entry)) for entry in wanted}
        outgoing: list[list[Tensor]] = [[] for _ in range(self.world)]
        incoming = [0] * self.world
        anybody = False
        for entry in wanted:
            writer = self.writer[entry.name]
            for move in moves[entry.name]:
                if move.sender != writer:
                    anybody = True
                    if move.sender == rank:
                        outgoing[writer].append(move.piece.part(local, move.box).reshape(-1).view(torch.uint8))
                    if writer == rank:
                        incoming[move.sender] += move.box.numel * tensor.dtype.itemsize
        arrived = _exchanged(outgoing, incoming, local.device) if anybody else []
        taken = [0] * self.world
        for entry in wanted:
            if self.writer[entry.name] != rank:
                continue
            whole = Box(entry.start, entry.size)
            own = moves[entry.name]
            if len(own) == 1 and own[0].sender == rank:
                yield entry, entry.from_source(own[0].piece.part(local, whole))
                continue
            box = torch.empty(entry.size, dtype=tensor.dtype, device=local.device)
            target = Piece(whole, (0,) * len(entry.size))
            for move in own:
                if move.sender == rank:
                    part = move.piece.part(local, move.box)
                else:
                    first = taken[move.sender]
                    taken[move.sender] += move.box.numel * tensor.dtype.itemsize
                    part = arrived[move.sender][first : taken[move.sender]].view(tensor.dtype).view(move.box.size)
                target.part(box, move.box).copy_(part)
            yield entry, entry.from_source(box)


def _exchanged(outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[int], device: torch.device) -> list[Tensor]:
    """The bytes from each process."""
    sizes = [sum(part.numel() for part in parts) for parts in outgoing]
    flat = [part for parts in outgoing for part in parts]
    sent = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=device)
    received = torch.empty(sum(incoming), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, sent, list(incoming), sizes)
    return list(received.split(list(incoming)))
