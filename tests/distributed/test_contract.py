"""docs/contracts/sharding.md says where the tensors of real models are."""

from __future__ import annotations

import math
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.models import batches, model, spec
from tests.distributed.spawn import Worlds
from tests.distributed.test_parallelize import loss_of, optimizer_of
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import _StridedShard

from moesaic.dist import Layout, Meshes, ParallelConfig, parallelize
from moesaic.dist.embedding import partitioned_elements, replicated_elements
from moesaic.dist.placement import placed_parameters

PAGE = (Path(__file__).parents[2] / "docs" / "contracts" / "sharding.md").read_text(encoding="utf-8")
AXES = ("dp_shard", "edp_shard", "ep", "esp", "world")

FULL: dict[str, Any] = {
    "experts": {"num_experts": 6, "intermediate_size": 8, "bias": True},
    "router": {"type": "recurrent", "top_k": 2, "state_size": 5},
    "shared_experts": {"num_experts": 1, "sigmoid_gate": True},
    "depth": {"capacity": 0.5},
    "layers": {"only": [1]},
}
PLAIN: dict[str, Any] = {
    "experts": {"num_experts": 4, "intermediate_size": 8, "bias": True, "gated": False, "activation": "gelu"},
    "router": {"type": "top_k", "top_k": 2, "score_function": "sigmoid", "selection_bias": True},
}


def table(first: str) -> list[dict[str, str]]:
    """The rows of the table whose first column has this name."""
    lines = iter(PAGE.splitlines())
    for line in lines:
        if line.startswith(f"| {first} |"):
            names = [cell.strip() for cell in line.strip("|").split("|")]
            next(lines)
            rows = []
            for row in lines:
                if not row.startswith("|"):
                    break
                rows.append(dict(zip(names, (cell.strip() for cell in row.strip("|").split("|")), strict=True)))
            return rows
    raise AssertionError(f"no table {first}")


def as_in_table(parameter: Any) -> dict[str, str]:
    if not isinstance(parameter, DTensor):
        return {}
    axes = parameter.device_mesh.mesh_dim_names
    assert axes is not None
    found = {}
    for axis, placement in zip(axes, parameter.placements, strict=True):
        if not isinstance(placement, Replicate):
            # FSDP writes its own cut as strided, too: it comes after that of `ep`, whose axis is the inner one.
            strided = isinstance(placement, _StridedShard) and axis == "esp"
            found[axis] = f"{'Strided' if strided else 'Shard'}({placement.dim})"  # type: ignore[attr-defined]
    return found


def placements(moe: dict[str, Any], parallel: dict[str, Any]) -> dict[str, tuple[str, dict[str, str]]]:
    """Kind and placement of every parameter; optimiser state and buffers are checked here."""
    config, world, rank = ParallelConfig.from_dict(parallel), dist.get_world_size(), dist.get_rank()
    module = model(spec(**moe))
    parallelize(module, Meshes.of(Layout.of(config, world, spec(**moe)), "cpu"), config)
    optimizer, ids_BS = optimizer_of(module), batches(1)[0]
    loss_of(module, ids_BS.chunk(world)[rank], ids_BS[:, 1:].numel()).backward()
    optimizer.step()
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert as_in_table(state[name]) == as_in_table(parameter)
    assert not any(isinstance(buffer, DTensor) for buffer in module.buffers())
    return {placed.name: (placed.kind, as_in_table(placed.parameter)) for placed in placed_parameters(module)}


@pytest.mark.parametrize(
    ("moe", "world", "parallel"),
    [
        (FULL, 4, {"ep": 2}),
        (FULL, 4, {"dp_replicate": 2, "ep": 2, "esp": 2, "partition_embedding": True}),
        (PLAIN, 4, {"esp": 2}),
    ],
)
def test_parameters_are_where_the_table_says(
    worlds: Worlds, moe: dict[str, Any], world: int, parallel: dict[str, Any]
) -> None:
    rows, layout = table("tensor"), Layout.of(ParallelConfig.from_dict(parallel), world, spec(**moe))
    if not parallel.get("partition_embedding"):
        rows = [row for row in rows if row["kind"] != "embedding"]
    matched = set()
    for name, (kind, found) in worlds(world, placements, moe, parallel)[0].items():
        row = next(row for row in rows if fnmatchcase(name, row["name"].strip("`")))
        matched.add(row["name"])
        assert kind == row["kind"], name
        expected = {}
        for axis in AXES:
            choices = re.findall(r"(?:Shard|Strided)\(\d\)", row[axis])
            if choices:
                even = layout.edp_shard == 1 or (spec(**moe).experts.num_experts // layout.ep) % layout.edp_shard == 0
                expected[axis] = choices[0] if even else choices[-1]
        assert found == expected, name
    gated = spec(**moe).experts.gated
    patterns = {row["name"] for row in rows if ".up_proj" not in row["name"] if gated}
    assert patterns <= matched


def test_the_drawn_processes_are_those_of_the_layout() -> None:
    layout = Layout(dp_replicate=2, dp_shard=4, ep=2)
    views = {
        ("dp_replicate", "dp_shard"): (layout.dp_replicate, layout.dp_shard),
        ("edp_replicate", "edp_shard", "ep", "esp"): (layout.edp_replicate, layout.edp_shard, layout.ep, layout.esp),
    }
    rows = table("rank")
    assert [int(row["rank"]) for row in rows] == list(range(layout.world))
    for axes, sizes in views.items():
        ranks = torch.arange(math.prod(sizes)).view(sizes)
        for row in rows:
            assert int(row["rank"]) == ranks[tuple(int(row[axis]) for axis in axes)]
    for row in rows:
        computed = torch.arange(8).chunk(layout.ep)[int(row["ep"])]
        assert row["experts it computes"].split() == [str(int(expert)) for expert in computed]
        stored = computed.chunk(layout.edp_shard)[int(row["edp_shard"])]
        assert row["experts it stores"].split() == [str(int(expert)) for expert in stored]
        assert row["dense shard"][0] == str(int(row["dp_shard"]) + 1)


def test_elements_sent_are_those_of_the_formula() -> None:
    for row in table("tokens T"):
        assert float(row["columns"]) == round(partitioned_elements(int(row["tokens T"]), 8192, 8) / 1e6, 1)
        assert float(row["whole table"]) == round(replicated_elements(50304, 8192, 8) / 1e6, 1)
