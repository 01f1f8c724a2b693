"""Training over processes equals training in one, for every kind of layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.models import batches, model, spec
from tests.distributed.spawn import Worlds
from torch import Tensor, nn

from moesaic.dist import Layout, Meshes, ParallelConfig, Sharded, clip_grad_norm, parallelize, sync_replicated
from moesaic.train.optimizer import parameter_groups

STEPS, CLIP = 20, 0.05
FEW = 6  # where another test has seen that differences do not grow over STEPS


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(module, 0.1), lr=3e-3, fused=True)


def loss_of(module: Any, ids_BS: Tensor, tokens: int) -> Tensor:
    return module(input_ids=ids_BS, labels=ids_BS, num_items_in_batch=tokens).loss


def alone(moe: dict[str, Any], accumulation: int, steps: int = FEW) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step in one process."""
    return steps_alone(model(spec(**moe)), accumulation, steps)


def steps_alone(module: Any, accumulation: int = 1, steps: int = FEW) -> list[tuple[float, float]]:
    optimizer, found = optimizer_of(module), []
    module.set_training_progress(0.0)
    for ids_BS in batches(steps):
        tokens = ids_BS[:, 1:].numel()
        losses = []
        for part_BS in ids_BS.chunk(accumulation):
            loss = loss_of(module, part_BS, tokens)
            loss.backward()
            losses.append(loss.item())
        norm = nn.utils.clip_grad_norm_(module.parameters(), CLIP).item()
        optimizer.step()
        optimizer.zero_grad()
        found.append((sum(losses), norm))
    return found


def together(
    moe: dict[str, Any], accumulation: int, parallel: dict[str, Any], checkpointing: bool, steps: int = FEW
) -> list[tuple[float, float]]:
    """The same on each rank of a world."""
    config = ParallelConfig.from_dict(parallel)
    module = model(spec(**moe))
    if checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    meshes = Meshes.of(Layout.of(config, dist.get_world_size(), spec(**moe)), "cpu")
    return steps_together(parallelize(module, meshes, config), accumulation, steps)


def steps_together(sharded: Sharded, accumulation: int = 1, steps: int = FEW) -> list[tuple[float, float]]:
    module: Any = sharded.model
    optimizer, found = optimizer_of(module), []
    module.set_training_progress(0.0)
    for ids_BS in batches(steps):
        tokens = ids_BS[:, 1:].numel()
        total = torch.zeros(())
        parts = ids_BS.chunk(accumulation)
        for index, part_BS in enumerate(parts):
            sharded.set_last_micro_batch(index == len(parts) - 1)
            loss = loss_of(module, part_BS.chunk(dist.get_world_size())[dist.get_rank()], tokens)
            loss.backward()
            total += loss.detach()
        dist.all_reduce(total)
        sync_replicated(sharded.replicated)
        norm = clip_grad_norm(module.parameters(), CLIP).item()
        optimizer.step()
        optimizer.zero_grad()
        found.append((total.item(), norm))
    return found


CASES = [
    pytest.param(2, {}, id="fsdp2"),
    pytest.param(2, {"dp_replicate": 2}, id="replicate2"),
    pytest.param(2, {"ep": 2}, id="ep2"),
    pytest.param(2, {"dp_replicate": 2, "ep": 2}, id="replicate2-ep2"),
    pytest.param(2, {"esp": 2}, id="esp2"),
    pytest.param(2, {"ep": 2, "exchange": "all_gather"}, id="ep2-all-gather"),
    pytest.param(4, {"ep": 2, "esp": 2}, id="ep2-esp2"),
    pytest.param(4, {"dp_replicate": 2, "esp": 2}, id="hsdp2x2-esp2"),
    pytest.param(4, {"ep": 2}, id="fsdp4-ep2"),
    pytest.param(4, {"ep": 4}, id="ep4"),
    pytest.param(4, {"dp_replicate": 2, "ep": 2}, id="hsdp2x2-ep2"),
    pytest.param(4, {"dp_replicate": 2, "ep": 4}, id="hsdp2x2-ep4"),
]


SHARED: dict[str, Any] = {"shared_experts": {"num_experts": 1}}


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return torch.tensor(alone(SHARED, 1, STEPS))


@pytest.mark.parametrize(("world", "parallel"), CASES)
def test_twenty_steps_equal_one_process(worlds: Worlds, expected: Tensor, world: int, parallel: dict[str, Any]) -> None:
    for found in worlds(world, together, SHARED, 1, parallel, False, STEPS):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)


def test_openmoe_layers(worlds: Worlds) -> None:
    """Three parts in the first projection of a split expert, a network behind the layer, a dense layer of our own."""
    moe: dict[str, Any] = {
        "experts": {"num_experts": 8, "intermediate_size": 8, "activation": "swiglu_double", "bias": True},
        "shared_experts": {"placement": "after"},
        "layers": {"every": 2},
        "dense_layers": {"intermediate_size": 12, "activation": "swiglu_double"},
    }
    expected = torch.tensor(alone(moe, 1))
    for found in worlds(2, together, moe, 1, {"esp": 2}, True):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_and_recomputation(worlds: Worlds, checkpointing: bool) -> None:
    expected = torch.tensor(alone({}, 2))
    for found in worlds(4, together, {}, 2, {"dp_replicate": 2, "ep": 2}, checkpointing):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)
