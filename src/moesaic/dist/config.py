"""The `parallel` section of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from moesaic.configuration import Config

Exchange = Literal["ragged", "padded", "all_gather"]
AllToAll = Literal["auto", "flat", "hierarchical"]


class ParallelConfig(Config):
    """How a run is spread over processes. Every process trains on its own rows of the global batch.

    The result does not depend on it: losses, gradients and checkpoints are those of one process at the same
    `data.batch_size`. With one process nothing of this is read.

    Attributes:
        dp_replicate: groups of processes that hold the same shards of the dense parameters (HSDP; without `dp_shard` it
            is plain data parallelism).
        dp_shard: processes over which parameters, gradients and optimiser are sharded (FSDP2); "auto" takes all that
            `dp_replicate` leaves.
        ep: processes over which the experts of a layer are spread, each holding N / ep whole ones.
        esp: processes over which each expert is split, by its hidden width F (FSMoE, arXiv 2501.10714, section 2.2); meant
            for the devices of one host.
        exchange: how tokens reach experts on other processes. "ragged" sends what is needed; "padded" sends blocks of a
            size that follows from `moe.capacity`, without asking how much is needed; "all_gather" gives every token to
            every process of the group, which small groups can afford.
        all_to_all: "flat", or "hierarchical" in two phases, inside hosts and between them (SE-MoE, arXiv 2205.10034),
            which sends fewer, larger messages between hosts; "auto" takes it where a group spans hosts with several
            processes each.
        partition_embedding: give each process some columns of the token embedding instead of a copy of it whose gradient
            must be summed (SE-MoE).
        timeout_seconds: after this long without an answer from another process a run fails.
    """

    dp_replicate: PositiveInt = 1
    dp_shard: PositiveInt | Literal["auto"] = "auto"
    ep: PositiveInt = 1
    esp: PositiveInt = 1
    exchange: Exchange = "ragged"
    all_to_all: AllToAll = "auto"
    partition_embedding: bool = False
    timeout_seconds: PositiveFloat = 600.0
