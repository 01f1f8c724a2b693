"""Balance losses over the batch see the batch of all processes: value and gradient equal those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.models import model, spec
from tests.distributed.spawn import Worlds
from tests.distributed.test_parallelize import steps_alone, steps_together
from tests.layer.test_balance import BATCH_LOSSES, context_of, route
from torch import Tensor

from moesaic.dist import Layout, Meshes, ParallelConfig, parallelize

SEQUENCES, LENGTH, N, K = 4, 6, 6, 2


def whole() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, mask with padding, and weights of the sequences, of the global batch."""
    generator = torch.Generator().manual_seed(5)
    logits_TN = torch.randn(SEQUENCES * LENGTH, N, generator=generator, dtype=torch.float64)
    mask_T = torch.rand(SEQUENCES * LENGTH, generator=generator) < 0.8
    return logits_TN, mask_T, torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)


def losses_of_part(rank: int, world: int, group: Any) -> list[tuple[Tensor, Tensor]]:
    """Each loss's share, and the gradient of the logits, of the sequences of a rank."""
    logits_TN, mask_T, weight_B = (tensor.chunk(world)[rank] for tensor in whole())
    count = SEQUENCES // world
    context = context_of(SEQUENCES, SEQUENCES * LENGTH, whole()[1])
    context.batch_size, context.mask_T, context.group = count, mask_T, group
    context.modality_T = context.modality_T.chunk(world)[rank]  # type: ignore[union-attr]
    context.task_B = context.task_B.chunk(world)[rank]  # type: ignore[union-attr]
    found = []
    for loss in BATCH_LOSSES:
        leaf_TN = logits_TN.clone().requires_grad_()
        value = (loss.of_sequences(route(leaf_TN, K), context) * weight_B).sum()
        value.backward()
        assert leaf_TN.grad is not None
        found.append((value.detach(), leaf_TN.grad))
    return found


def on_rank() -> list[tuple[Tensor, Tensor]]:
    return losses_of_part(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


@pytest.mark.parametrize("world", [2, 4])
def test_every_loss_equals_that_of_one_process(worlds: Worlds, world: int) -> None:
    ranks = worlds(world, on_rank)
    for index, (value, gradient) in enumerate(losses_of_part(0, 1, None)):
        name = BATCH_LOSSES[index].name
        together_value = sum(found[index][0] for found in ranks)
        torch.testing.assert_close(together_value, value, rtol=1e-12, atol=1e-12, msg=name)
        parts = torch.cat([found[index][1] for found in ranks])
        torch.testing.assert_close(parts, gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_without_the_group_they_differ() -> None:
    """The test above would fail if sums stayed on their rank."""
    value = losses_of_part(0, 1, None)[0][0]
    alone_on_ranks = sum(losses_of_part(rank, 2, None)[0][0] for rank in range(2))
    assert abs(value - alone_on_ranks) > 1e-3


# Of the model's losses those that need no labels of tokens and no noisy router.
BALANCE = [
    {"type": "load_balancing", "coefficient": 0.05, "scope": "batch"},
    {"type": "importance", "coefficient": 0.05, "scope": "batch"},
    {"type": "mutual_information", "coefficient": 0.05, "scope": "batch"},
    {"type": "device_balance", "coefficient": 0.05, "num_devices": 2, "scope": "batch"},
    {"type": "stable_balance", "coefficient": 0.05, "scope": "batch"},
    {"type": "z_loss", "coefficient": 0.01},
]


def checkpointed(reentrant: bool | None) -> Any:
    module = model(spec(balance=BALANCE))
    if reentrant is not None:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return module


def steps_on_rank(parallel: dict[str, Any], reentrant: bool | None) -> list[tuple[float, float]]:
    config = ParallelConfig.from_dict(parallel)
    meshes = Meshes.of(Layout.of(config, dist.get_world_size(), spec()), "cpu")
    return steps_together(parallelize(checkpointed(reentrant), meshes, config))


@pytest.mark.parametrize(
    ("world", "parallel", "reentrant"),
    [(2, {"ep": 2}, False), (2, {"ep": 2}, True), (4, {"dp_replicate": 2, "ep": 2}, None)],
)
def test_steps_equal_one_process(worlds: Worlds, world: int, parallel: dict[str, Any], reentrant: bool | None) -> None:
    expected = torch.tensor(steps_alone(checkpointed(None)))
    for found in worlds(world, steps_on_rank, parallel, reentrant):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)
