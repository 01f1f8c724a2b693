"""DeepSpeed's groups beside our meshes, and its layer beside ours with experts on two ranks.

Runs where DeepSpeed is installed: `make test` tries to install it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.spawn import run_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from moesaic.dist.expert_parallel import ExpertParallel
from moesaic.dist.layout import Layout
from moesaic.dist.mesh import Meshes
from moesaic.layer import RoutingContext

pytest.importorskip("deepspeed.moe.layer")


def start_deepspeed() -> Any:
    """Their module of groups, over the processes of torch.distributed."""
    import deepspeed.comm
    from deepspeed.utils import groups

    # Starting would compile an all-reduce over shared memory for half a minute. `deepspeed.comm.torch` is PyTorch itself.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.comm.init_distributed("gloo", verbose=False)
    return groups


def their_groups(ep: int, data_first: bool) -> tuple[list[int], list[int]]:
    """Ranks that share a layer's experts with this one, and those that hold the same experts."""
    groups = start_deepspeed()
    name = f"ep_size_{ep}"
    for known in (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP):
        known.pop(name, None)
    groups._create_expert_and_data_parallel(ep, use_data_before_expert_parallel_=data_first)
    expert, data = groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
    return dist.get_process_group_ranks(expert), dist.get_process_group_ranks(data)


@pytest.fixture
def eight_ranks() -> Iterator[Callable[[int], None]]:
    """Start torch.distributed, without connections, as one of eight ranks."""

    def start(rank: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())

    yield start
    dist.destroy_process_group()
    sys.modules["deepspeed.comm.comm"].cdb = None  # type: ignore[attr-defined]


def both_orders() -> list[tuple[list[int], list[int]]]:
    """This rank's groups: ours, and theirs in both orders."""
    meshes = Meshes.of(Layout(dp_shard=8, ep=2), "cpu")
    ours = (meshes.experts["ep"].mesh.tolist(), meshes.expert_data.mesh.flatten().tolist())
    return [ours, their_groups(2, data_first=False), their_groups(2, data_first=True)]


def test_groups_of_eight_ranks_in_both_orders(eight_ranks: Callable[[int], None]) -> None:
    """Ours are those of their default, where neighbours share experts; with data first, every fourth rank does."""
    found = []
    for rank in range(8):
        eight_ranks(rank)
        found.append(both_orders())
    expert, data = ([sorted({tuple(rank[order][kind]) for rank in found}) for order in range(3)] for kind in range(2))
    neighbours, every_second = [(0, 1), (2, 3), (4, 5), (6, 7)], [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert expert == [neighbours, neighbours, [(0, 4), (1, 5), (2, 6), (3, 7)]]
    assert data == [every_second, every_second, [(0, 1, 2, 3), (4, 5, 6, 7)]]


def step(k: int, factor: float | None) -> list[list[torch.Tensor]]:
    """Of both layers: output, gradients of tokens, of the router over all ranks, and of this rank's experts."""
    from tests.parity.deepspeed_layer import HIDDEN, both, part, weights

    start_deepspeed()
    rank, size = dist.get_rank(), dist.get_world_size()
    theirs, ours = both(k, factor, ep=size, rank=rank)
    theirs.set_deepspeed_parallelism()
    assert dist.group.WORLD is not None
    ours.dispatch = ExpertParallel(ours.gate.num_experts, dist.group.WORLD)
    # Ranks have different numbers of tokens where nothing drops: then their slots are those of the fullest expert.
    x_BTD = torch.randn(1, 24 + 4 * rank * (factor is None), HIDDEN, generator=torch.Generator().manual_seed(rank))
    found = []
    for module in (theirs, ours):
        leaf_BTD = x_BTD.clone().requires_grad_()
        y_BTD = module(leaf_BTD)[0] if module is theirs else ours(leaf_BTD, RoutingContext(seed=torch.tensor(0)))
        y_BTD.square().mean().backward()
        of = part(theirs, "gate", lambda weight: weight.grad) if module is theirs else weights(ours)[0].grad
        dist.all_reduce(of)
        found.append([y_BTD.detach(), leaf_BTD.grad, of])
    found[0] += [part(theirs, name, lambda weight: weight.grad) for name in ("gate_up", "down")]
    found[1] += [weight.grad for weight in weights(ours)[1:]]
    return found


@pytest.mark.parametrize(("k", "factor"), [(1, None), (2, None), (2, 0.5), (3, 0.75)])
def test_the_layer_over_two_ranks(k: int, factor: float | None) -> None:
    """Capacity counts the tokens of each rank on its own, for them and for us."""
    for theirs, ours in run_ranks(2, step, k, factor):
        torch.testing.assert_close(ours, theirs)
