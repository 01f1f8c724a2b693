"""Predicted memory and traffic against real runs of 1, 2 and 4 ranks, and against numbers of papers."""

from __future__ import annotations

import functools
from itertools import combinations
from statistics import fmean
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.models import BACKBONE, batches, model, spec
from tests.distributed.spawn import Worlds

import moesaic
from moesaic.dist import Layout, Meshes, ParallelConfig, clip_grad_norm, parallelize, sync_replicated
from moesaic.dist.embedding import partitioned_elements
from moesaic.dist.plan import (
    Candidate,
    Cluster,
    Group,
    Link,
    Part,
    Rank,
    Unit,
    Workload,
    exchange_seconds,
    plan,
    ring_seconds,
    units_of,
)
from moesaic.dist.plan.balanced import expected_ranks
from moesaic.dist.plan.links import exchange_split
from moesaic.dist.plan.measure import Measured, SentBytes, measure_step
from moesaic.train.optimizer import parameter_groups

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 256}
MOE: dict[str, Any] = {"experts": {"num_experts": 8, "intermediate_size": 64}, "layers": {"first_dense": 1}}
ROWS, LENGTH = 16, 64


@functools.cache
def predicted(world: int, columns: bool, checkpointing: bool, accumulation: int, bf16: bool) -> dict[Layout, Candidate]:
    with torch.device("meta"):
        module = moesaic.build({**BACKBONE, **SIZES}, spec(**MOE))
    cluster = Cluster(1, world, 80e9, 1e12, Link(1e-10), Link(1e-10))
    workload = Workload(ROWS, LENGTH, accumulation, bf16, checkpointing, accelerated=False)
    config = ParallelConfig(partition_embedding=columns)
    found = plan(module, spec(**MOE), workload, cluster, config)
    return {candidate.layout: candidate for candidate in found.candidates}


def measured(
    parallel: dict[str, Any], checkpointing: bool, accumulation: int, bf16: bool
) -> tuple[Measured, dict[str, int]]:
    """Memory and traffic of a step on each rank of a world."""
    module, config, world = model(spec(**MOE), **SIZES), ParallelConfig.from_dict(parallel), dist.get_world_size()
    if checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sharded = None
    if world > 1:
        sharded = parallelize(
            module,
            Meshes.of(Layout.of(config, world, spec(**MOE)), "cpu"),
            config,
            param_dtype=torch.bfloat16 if bf16 else None,
        )
    optimizer = torch.optim.AdamW(parameter_groups(module, 0.1), fused=True)
    module.set_training_progress(0.0)
    (ids_BS,) = batches(1, rows=ROWS, length=LENGTH, vocabulary=SIZES["vocab_size"])
    own_BS = ids_BS.chunk(world)[dist.get_rank()]

    def backward() -> None:
        for micro_batch in range(accumulation):
            if sharded is not None:
                sharded.set_last_micro_batch(micro_batch == accumulation - 1)
            inputs = {"input_ids": own_BS, "labels": own_BS, "num_items_in_batch": ROWS * LENGTH}
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = module(**inputs, output_routing=True, use_cache=False)
            loss, routing = output.loss, output.routing  # what the training loop keeps
            del output
            loss.backward()
            del routing

    def update() -> None:
        if sharded is not None:
            sync_replicated(sharded.replicated)
            clip_grad_norm(module.parameters(), 1.0)
        optimizer.step()

    found = measure_step(module, optimizer, backward, update)
    with SentBytes() as sent:
        backward()
        update()
    return found, sent.by_collective


CASES = [
    pytest.param(1, {}, False, 1, False, id="alone"),
    pytest.param(1, {}, True, 2, False, id="alone-recomputed-accumulated"),
    pytest.param(2, {}, False, 1, True, id="fsdp2-bf16"),
    pytest.param(2, {"ep": 2}, False, 2, False, id="ep2-accumulated"),
    pytest.param(2, {"partition_embedding": True}, True, 1, False, id="columns2-recomputed"),
    pytest.param(4, {"ep": 2}, False, 1, False, id="fsdp4-ep2"),
    pytest.param(4, {"dp_replicate": 2, "ep": 4}, False, 1, False, id="hsdp2x2-ep4"),
    pytest.param(4, {"ep": 4}, True, 1, False, id="ep4-recomputed"),
]


@pytest.mark.parametrize(("world", "parallel", "checkpointing", "accumulation", "bf16"), CASES)
def test_memory_and_traffic_are_as_predicted(
    worlds: Worlds, world: int, parallel: dict[str, Any], checkpointing: bool, accumulation: int, bf16: bool
) -> None:
    config = ParallelConfig.from_dict(parallel)
    layout = Layout.of(config, world, spec(**MOE))
    candidate = predicted(world, config.partition_embedding, checkpointing, accumulation, bf16)[layout]
    found = worlds(world, measured, parallel, checkpointing, accumulation, bf16)
    memory = [memory for memory, _ in found]
    assert candidate.memory.parameters == max(rank.parameters for rank in memory)
    assert candidate.memory.gradients == max(rank.gradients for rank in memory)
    assert candidate.memory.optimizer == max(rank.optimizer for rank in memory)
    # Routers that have learnt nothing don't balance their load; the mean of ranks has a balanced one's share.
    assert candidate.memory.peak == pytest.approx(fmean(rank.peak for rank in memory), rel=0.1)

    def bytes_of(*beginnings: str) -> float:
        return sum(flow.bytes for flow in candidate.flows if flow.name.startswith(beginnings))

    sent = {name: fmean(rank[name] for _, rank in found) for name in found[0][1]}
    assert sent["all_gather"] == pytest.approx(bytes_of("gather", "embedding ids"), rel=0.001)
    assert sent["reduce_scatter"] == pytest.approx(bytes_of("reduce"), rel=0.001)
    assert sent["all_reduce"] == pytest.approx(bytes_of("sum"), rel=0.01, abs=100)  # scalars are left out
    exchanged = bytes_of("send", "fetch", "embedding rows")
    assert (exchanged > 0) == (layout.ep > 1 or config.partition_embedding)
    assert sent["all_to_all"] == pytest.approx(exchanged, rel=0.1)


def test_columns_of_the_embedding_travel_by_the_formula() -> None:
    candidate = predicted(4, True, False, 2, False)[Layout(1, 4)]
    flows = {flow.name: flow.bytes for flow in candidate.flows}
    tokens, hidden = ROWS * LENGTH // 4, SIZES["hidden_size"]
    ids, rows = tokens * 3, partitioned_elements(tokens, hidden, 4) - tokens * 3
    assert flows["embedding ids"] == 2 * 8 * ids
    assert flows["embedding rows"] == 2 * 4 * rows
    # What is neither gathered nor reduced then: the table, gathered once and reduced once in a micro-batch.
    whole = {flow.name: flow.bytes for flow in predicted(4, False, False, 2, False)[Layout(1, 4)].flows}
    saved = 2 * 4 * SIZES["vocab_size"] * hidden * 3 / 4
    assert whole["gather dense"] - flows["gather dense"] == saved
    assert whole["reduce dense"] - flows["reduce dense"] == saved


def test_units_hold_every_parameter_once() -> None:
    module = model(spec(**MOE), **SIZES)
    units = units_of(module)
    assert sorted(part.name for unit in units for part in unit.parts) == sorted(
        name for name, _ in module.named_parameters()
    )
    assert sum(unit.gathered(Layout()) for unit in units) == sum(p.numel() for p in module.parameters())
    assert [unit.name for unit in units][:5] == [
        "root",
        "layer 0",
        "layer 1",
        "layer 1 router",
        "layer 1 experts",
    ]


def test_forms_of_zero_by_their_own_bytes() -> None:
    """DeepSpeed's mixed-precision forms: 2 bytes of weights, 2 of gradients, 12 of optimiser; W 4, ep 2."""
    base = Unit("base", "dense", 0, (Part("base", (1_000_000,), "dense", 4, True),))
    experts = Part("experts", (8, 200_000, 1), "experts", 4, True, (0, 1), "gate_up_proj")
    units = base, Unit("experts", "experts", 0, (experts,))
    sharded, whole = Layout(1, 4, 2, 1), Layout(4, 1, 2, 1)
    gathered = sum(unit.gathered(sharded) for unit in units)
    stored = sum(unit.stored(sharded) for unit in units)
    assert 16 * gathered == 28.8e6  # E+D
    assert 4 * gathered + 12 * stored == 15.0e6  # Z1
    assert 2 * gathered + 14 * stored == 12.7e6  # Z2
    assert (2 * gathered, 14 * stored) == (3.6e6, 9.1e6)  # Z2-Off: device, host
    # Ours keeps float32 weights, gradients and both averages: 16 bytes too, all sharded or none.
    replicated = Rank(units, whole, fsdp=True)
    assert replicated.parameters + replicated.gradients(units) + replicated.optimizer == 28.8e6 + 2 * 4
    fully = Rank(units, sharded, fsdp=True)
    assert fully.parameters + fully.gradients(units) + fully.optimizer == 16 * stored + 2 * 4


@pytest.mark.parametrize(
    ("size", "flat", "hierarchical"), [(64e3, 0.759e-3, 0.129e-3), (1e6, 0.815e-3, 0.188e-3), (64e6, 4.60e-3, 4.15e-3)]
)
def test_all_to_all_between_hosts(size: float, flat: float, hierarchical: float) -> None:
    """SE-MoE's model on 4 hosts of 8: in two phases fewer messages pay latency between hosts."""
    group, links = Group(32, 4), (Link(1 / 300e9, 5e-6), Link(1 / 12.5e9, 30e-6))
    assert exchange_seconds(size, group, *links, hierarchical=False) == pytest.approx(flat, rel=0.005)
    assert exchange_seconds(size, group, *links, hierarchical=True) == pytest.approx(hierarchical, rel=0.005)
    # The same between hosts; the first phase also carries inside what is for other hosts.
    assert exchange_split(32.0, group, hierarchical=False) == (7.0, 24.0)
    assert exchange_split(32.0, group, hierarchical=True) == (28.0, 24.0)


def test_a_ring_waits_for_its_slowest_edge() -> None:
    inner, outer = Link(1.0, 0.1), Link(10.0, 0.5)
    assert ring_seconds(12.0, Group(1, 1), inner, outer) == 0
    assert ring_seconds(12.0, Group(4, 1), inner, outer) == pytest.approx(3 * 0.1 + 12)
    # Of 4 edges 2 lead to the other host: half of the bytes.
    assert ring_seconds(12.0, Group(4, 2), inner, outer) == pytest.approx(3 * 0.5 + 60)
    assert ring_seconds(12.0, Group(4, 2), inner, outer, rounds=2) == pytest.approx(6 * 0.5 + 60)


def test_groups_by_rank_order() -> None:
    cluster = Cluster(2, 4, 1, 1, Link(1), Link(1))
    assert cluster.group(1, 4) == Group(4, 1)
    assert cluster.group(1, 8) == Group(8, 2)
    assert cluster.group(4, 2) == Group(2, 2)
    assert cluster.group(2, 2) == Group(2, 1)
    # Ranks 0-2, 3-5, ...: the second group is on two hosts.
    assert Cluster(3, 4, 1, 1, Link(1), Link(1)).group(1, 3) == Group(3, 2)


@pytest.mark.parametrize(("num_experts", "picks", "ranks"), [(8, 2, 2), (8, 2, 4), (8, 3, 4), (6, 6, 3), (8, 1, 8)])
def test_expected_ranks_by_enumeration(num_experts: int, picks: int, ranks: int) -> None:
    local = num_experts // ranks
    touched = [len({expert // local for expert in picked}) for picked in combinations(range(num_experts), picks)]
    assert expected_ranks(num_experts, picks, local, ranks) == pytest.approx(fmean(touched))
