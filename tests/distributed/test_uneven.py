"""Processes whose experts get no token, experts that processes can't share out, and other ways to run the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.models import model, spec
from tests.distributed.spawn import Worlds
from tests.distributed.test_parallelize import steps_alone, steps_together
from torch.distributed.tensor import DTensor

from moesaic.dist import Layout, Meshes, ParallelConfig, parallelize
from moesaic.dist.parallelize import prefetch
from moesaic.hf.backbone import decoder_layers
from moesaic.layer import MoEBlock

COLLAPSED = {"router": {"type": "top_k", "top_k": 1, "score_function": "sigmoid", "selection_bias": True}}


def collapsed(checkpointing: bool | None) -> Any:
    """A model all of whose tokens pick the last expert; recomputation by reentry or not, or none."""
    module = model(spec(**COLLAPSED))
    for block in module.moe_blocks().values():
        block.gate.e_score_correction_bias[-1] = 100.0
    if checkpointing is not None:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    return module


def collapsed_together(
    parallel: dict[str, Any], checkpointing: bool | None, ahead: bool
) -> tuple[list[tuple[float, float]], list[bool]]:
    config = ParallelConfig.from_dict(parallel)
    module = collapsed(checkpointing)
    sharded = parallelize(module, Meshes.of(Layout.of(config, dist.get_world_size(), spec()), "cpu"), config)
    if ahead:
        prefetch(module, decoder_layers(module))
    found = steps_together(sharded)
    moved = []
    for (name, parameter), (_, before) in zip(
        module.named_parameters(), collapsed(None).named_parameters(), strict=True
    ):
        if name.endswith("down_proj"):
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            # What gets no gradient only decays.
            moved += [
                not torch.allclose(new, old, rtol=0.02, atol=1e-5) for new, old in zip(whole, before, strict=True)
            ]
    return found, moved


@pytest.mark.parametrize(
    ("world", "parallel", "checkpointing", "ahead"),
    [
        (2, {"ep": 2}, True, False),
        (4, {"ep": 4}, False, False),
        (4, {"ep": 2}, None, True),
    ],
)
def test_all_tokens_to_one_expert(
    worlds: Worlds, world: int, parallel: dict[str, Any], checkpointing: bool | None, ahead: bool
) -> None:
    expected = torch.tensor(steps_alone(collapsed(None)))
    for found, moved in worlds(world, collapsed_together, parallel, checkpointing, ahead):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)
        assert moved == ([False] * 7 + [True]) * 2


def sharded_by_width(moe: dict[str, Any], parallel: dict[str, Any]) -> tuple[dict[str, int], list[tuple[float, float]]]:
    """The dimension over which FSDP shards each parameter of the experts, and the steps."""
    config = ParallelConfig.from_dict(parallel)
    module = model(spec(**moe))
    sharded = parallelize(module, Meshes.of(Layout.of(config, dist.get_world_size(), spec(**moe)), "cpu"), config)
    block = next(found for found in module.modules() if isinstance(found, MoEBlock))
    found = {}
    for name, parameter in block.experts.named_parameters():
        assert isinstance(parameter, DTensor)
        axes = parameter.device_mesh.mesh_dim_names
        assert axes is not None
        found[name] = parameter.placements[axes.index("edp_shard")].dim  # type: ignore[attr-defined]
    return found, steps_together(sharded)


def test_experts_that_can_not_be_shared_out_are_sharded_by_width(worlds: Worlds) -> None:
    """Three experts a process, for two to share: their hidden width; biases, which are small, unevenly."""
    moe = {"experts": {"num_experts": 6, "intermediate_size": 8, "bias": True}}
    expected = torch.tensor(steps_alone(model(spec(**moe))))
    for dimensions, found in worlds(4, sharded_by_width, moe, {"ep": 2}):
        assert dimensions == {"gate_up_proj": 2, "down_proj": 1, "gate_up_proj_bias": 0, "down_proj_bias": 0}
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)
