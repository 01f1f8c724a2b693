"""Batches mixed of domains by shares that may change during training, as shuffled and resumable as unmixed ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from moesaic.data.config import MixtureStretch
from moesaic.data.packing import Batch, PackedSequences
from moesaic.errors import ConfigError, DataError


class MixedBatches(Iterator[Batch]):
    """An endless iterator over training batches of which each domain has its share of the sequences.

    The sequences of a domain come in a permutation of (seed, domain, pass over it), however many of them a batch takes; a
    domain that runs out begins anew. Domains take turns so that after n sequences each has had its share of n, give or
    take one. As with `TokenBatches`, every shard walks the same global batches and takes its own rows.

    Args:
        sequences: training sequences of each domain.
        stretches: the shares, one stretch after the other.
        batch_size: sequences in a global batch; a shard gets batch_size / num_shards rows (B).
        seed: seed of the order.
        shard_index: which rows this process takes, 0 <= shard_index < num_shards.
        num_shards: number of data-parallel processes.

    Raises:
        ConfigError: if a share names no domain or one without a whole sequence, or shards do not divide the batch.
    """

    def __init__(
        self,
        sequences: Mapping[str, PackedSequences],
        stretches: Sequence[MixtureStretch],
        batch_size: int,
        seed: int = 0,
        *,
        shard_index: int = 0,
        num_shards: int = 1,
    ) -> None:
        for number, stretch in enumerate(stretches):
            for domain in stretch.shares:
                if not len(sequences.get(domain, ())):
                    known = ", ".join(name for name, found in sequences.items() if len(found))
                    raise ConfigError(
                        f"data.mixture.{number}.shares",
                        domain,
                        "is no domain with a whole training sequence",
                        f"these have one: {known}",
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
        self._sequences, self._stretches, self._seed = dict(sequences), tuple(stretches), seed
        self._batch_size, self._rows = batch_size, batch_size // num_shards
        self._first = shard_index * self._rows
        self._batch = 0
        self._taken = dict.fromkeys(self._sequences, 0)
        self._credit = dict.fromkeys(self._sequences, 0.0)
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def __next__(self) -> Batch:
        shares = self._shares()
        rows = [self._next_row(shares) for _ in range(self._batch_size)]
        self._batch += 1
        own = rows[self._first : self._first + self._rows]
        parts = [self._sequences[domain].batch([index]) for domain, index in own]
        return Batch(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def state_dict(self) -> dict[str, Any]:
        """Position after the batch taken last, with what identifies the order."""
        return {
            "batch_index": self._batch,
            "taken": dict(self._taken),
            "credit": dict(self._credit),
            **self._identity(),
        }

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
        self._batch = int(state["batch_index"])
        self._taken, self._credit = dict(state["taken"]), dict(state["credit"])

    def _shares(self) -> dict[str, float]:
        """Shares of the batch to come, adding up to 1."""
        stretch = next(found for found in self._stretches if found.until is None or self._batch < found.until)
        total = sum(stretch.shares.values())
        return {domain: share / total for domain, share in stretch.shares.items()}

    def _next_row(self, shares: Mapping[str, float]) -> tuple[str, int]:
        """The domain that is furthest behind its share, and its next sequence."""
        for domain, share in shares.items():
            self._credit[domain] += share
        domain = max(shares, key=lambda name: self._credit[name])
        self._credit[domain] -= 1
        epoch, index = divmod(self._taken[domain], len(self._sequences[domain]))
        self._taken[domain] += 1
        return domain, int(self._order(domain, epoch)[index])

    def _order(self, domain: str, epoch: int) -> np.ndarray:
        if self._orders.get(domain, (-1,))[0] != epoch:
            number = list(self._sequences).index(domain)
            order = np.random.default_rng([self._seed, number, epoch]).permutation(len(self._sequences[domain]))
            self._orders[domain] = (epoch, order)
        return self._orders[domain][1]

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "batch_size": self._batch_size,
            "num_sequences": {domain: len(found) for domain, found in self._sequences.items()},
            "mixture": [stretch.to_dict() for stretch in self._stretches],
        }
