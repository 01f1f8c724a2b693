"""Batches: endless, shuffled and resumable for training; fixed and in order for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moesaic.data.packing import Batch, PackedSequences
from moesaic.errors import ConfigError, DataError


class TokenBatches(Iterator[Batch]):
    """An endless iterator over shuffled training batches that resumes exactly where its state was saved.

    Each epoch takes the sequences in a permutation of (seed, epoch) and drops those that do not fill the last batch;
    other ones are dropped in the next epoch. Every shard walks the same global batches and takes its own rows, so
    which sequences step s sees does not depend on `num_shards`, and a state may be loaded with another number of them.

    Args:
        sequences: what to iterate over.
        batch_size: sequences in a global batch; a shard gets batch_size / num_shards rows (B).
        seed: seed of the order.
        shard_index: which rows this process takes, 0 <= shard_index < num_shards; rows of all shards, joined in
            order, are the global batch.
        num_shards: number of data-parallel processes.

    Attributes:
        epoch: number of full passes made.
        batch_index: batches already taken of this epoch.

    Raises:
        ConfigError: if there are fewer sequences than `batch_size`, or shards do not divide it.
    """

    def __init__(
        self, sequences: PackedSequences, batch_size: int, seed: int = 0, *, shard_index: int = 0, num_shards: int = 1
    ) -> None:
        if batch_size > len(sequences):
            raise ConfigError(
                "data.batch_size",
                batch_size,
                f"is more than the {len(sequences)} training sequences",
                "use a smaller batch, shorter sequences or more text",
            )
        if batch_size % num_shards:
            raise ConfigError(
                "data.batch_size",
                batch_size,
                f"cannot be shared by {num_shards} processes",
                f"choose a multiple of {num_shards}",
            )
        if not 0 <= shard_index < num_shards:
            raise ConfigError("shard_index", shard_index, "is not a shard", f"choose from 0 to {num_shards - 1}")
        self.sequences, self.batch_size, self.seed = sequences, batch_size, seed
        rows = batch_size // num_shards
        self._rows = slice(shard_index * rows, (shard_index + 1) * rows)
        self.batches_per_epoch = len(sequences) // batch_size
        self.epoch = self.batch_index = 0
        self._order = self._permutation()

    def __next__(self) -> Batch:
        if self.batch_index == self.batches_per_epoch:
            self.epoch, self.batch_index = self.epoch + 1, 0
            self._order = self._permutation()
        start = self.batch_index * self.batch_size
        self.batch_index += 1
        return self.sequences.batch(self._order[start : start + self.batch_size][self._rows])

    def state_dict(self) -> dict[str, int]:
        """Position after the batch taken last, with what identifies the order."""
        return {"epoch": self.epoch, "batch_index": self.batch_index, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch that was last when `state` was saved.

        Raises:
            DataError: if the state belongs to another order of sequences.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise DataError(
                    f"cannot resume: the saved position has {name} = {state.get(name)!r}, but this run has {value!r}; "
                    f"restore the data section of the saved run, or start a new one"
                )
        self.epoch, self.batch_index = int(state["epoch"]), int(state["batch_index"])
        self._order = self._permutation()

    def _identity(self) -> dict[str, int]:
        sequences = self.sequences
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sequence_length": sequences.sequence_length,
            "num_tokens": sequences.num_tokens,
        }

    def _permutation(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.epoch]).permutation(len(self.sequences))


class OrderedBatches(Sequence[Batch]):
    """All sequences in order, in batches that are the same each time; the last one may be smaller.

    Args:
        sequences: what to cut into batches.
        batch_size: sequences in a batch (B).
    """

    def __init__(self, sequences: PackedSequences, batch_size: int) -> None:
        self.sequences, self.batch_size = sequences, batch_size

    def __len__(self) -> int:
        return -(-len(self.sequences) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        start = index % len(self) * self.batch_size
        return self.sequences.batch(range(start, min(start + self.batch_size, len(self.sequences))))
