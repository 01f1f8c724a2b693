"""Checkpoints that any layout writes and any other reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.models import batches, model, spec
from tests.distributed.spawn import Worlds
from torch import Tensor, nn

from moesaic.dist import Layout, Meshes, ParallelConfig, Sharded, clip_grad_norm, parallelize, sync_replicated
from moesaic.dist.checkpoint import Snapshot, Team, load_optimizer, load_weights
from moesaic.train.optimizer import parameter_groups

STEPS, CLIP = 3, 0.05


class Run:
    """A tiny model in training, alone or spread over the processes there are."""

    def __init__(self, parallel: dict[str, Any] | None, moe: dict[str, Any] | None = None, **backbone: Any) -> None:
        self.module = model(spec(**(moe or {})), **backbone)
        self.sharded: Sharded | None = None
        if dist.is_initialized():
            config = ParallelConfig.from_dict(parallel or {})
            meshes = Meshes.of(Layout.of(config, dist.get_world_size(), spec(**(moe or {}))), "cpu")
            self.sharded = parallelize(self.module, meshes, config)
        self.rank = dist.get_rank() if self.sharded else 0
        self.world = dist.get_world_size() if self.sharded else 1
        self.optimizer = torch.optim.AdamW(parameter_groups(self.module, 0.1), lr=3e-3, fused=True)
        self.module.set_training_progress(0.0)

    def step(self, ids_BS: Tensor) -> float:
        rows_BS = ids_BS.chunk(self.world)[self.rank]
        loss = self.module(input_ids=rows_BS, labels=rows_BS, num_items_in_batch=ids_BS[:, 1:].numel()).loss
        loss.backward()
        total = loss.detach().clone()
        if self.sharded:
            dist.all_reduce(total)
            sync_replicated(self.sharded.replicated)
            clip_grad_norm(self.module.parameters(), CLIP)
        else:
            nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item()

    def save(self, path: Path, *, copy: bool = False) -> None:
        team = Team()
        snapshot = Snapshot(self.module, self.optimizer, team, copy=copy)
        with team.directory(path) as folder:
            snapshot.write(folder)

    def resume(self, path: Path) -> int:
        for tensor in [*self.module.parameters(), *self.module.buffers()]:
            tensor.data.zero_()
        for module in self.module.modules():
            if hasattr(module, "inv_freq"):  # not stored
                module.inv_freq, _ = module.compute_default_rope_parameters(module.config)
        read = load_weights(self.module, path, self.rank)
        load_optimizer(path / "optimizer", self.module, self.optimizer)
        return read


def save_after_steps(path: Path, *arguments: Any) -> list[float]:
    run = Run(*arguments)
    data = batches(2 * STEPS)
    losses = [run.step(ids_BS) for ids_BS in data[:STEPS]]
    run.save(path)
    return losses + [run.step(ids_BS) for ids_BS in data[STEPS:]]


def resume_and_go_on(path: Path, *arguments: Any) -> tuple[list[float], int]:
    run = Run(*arguments)
    read = run.resume(path)
    return [run.step(ids_BS) for ids_BS in batches(2 * STEPS)[STEPS:]], read


ESP = {"ep": 2, "esp": 2}


@pytest.mark.parametrize(
    ("world", "saved", "resumed"),
    [
        pytest.param(2, {"ep": 2}, [(1, {}), (4, {"ep": 2}), (4, ESP)], id="ep2"),
        pytest.param(1, {}, [(2, {}), (4, {"dp_replicate": 2, "ep": 4})], id="one"),
        pytest.param(4, ESP, [(1, {}), (2, {"dp_replicate": 2})], id="ep2-esp2"),
        pytest.param(4, {"ep": 2}, [(2, {"esp": 2}), (1, {})], id="fsdp4-ep2"),
    ],
)
def test_any_layout_goes_on_from_any_other(
    worlds: Worlds, world: int, saved: dict[str, Any], resumed: list[tuple[int, dict[str, Any]]], tmp_path: Path
) -> None:
    path = tmp_path / "step"
    expected = save_after_steps(path, saved) if world == 1 else worlds(world, save_after_steps, path, saved)[0]
    for other, parallel in resumed:
        found = [resume_and_go_on(path, parallel)] if other == 1 else worlds(other, resume_and_go_on, path, parallel)
        for losses, _ in found:
            torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected[STEPS:]), rtol=0, atol=1e-6)
