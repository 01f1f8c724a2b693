"""Weights that are drawn in parts equal those of a model that one process built and spread."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.models import BACKBONE, spec
from tests.distributed.spawn import Worlds
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import moesaic
from moesaic.dist import Layout, Meshes, ParallelConfig, Sharded, build_sharded, parallelize

SEED = 3
GPT2 = {"model_type": "gpt2", "vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}


def build_moe(moe: dict[str, Any], backbone: dict[str, Any]) -> Any:
    return moesaic.build({**BACKBONE, **backbone}, spec(**moe)).train()


def build_stock(values: dict[str, Any]) -> Any:
    values = dict(values)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_same(found: Sharded, expected: Sharded) -> None:
    ours, theirs = found.model, expected.model
    for kind in ("named_parameters", "named_buffers"):
        wanted = dict(getattr(theirs, kind)())
        given = dict(getattr(ours, kind)())
        assert list(given) == list(wanted)
        for name, tensor in wanted.items():
            assert given[name].dtype == tensor.dtype, name
            assert given[name].requires_grad == tensor.requires_grad, name
            assert torch.equal(local(given[name].detach()), local(tensor.detach())), name
    aliases = [{name: id(p) for name, p in m.named_parameters(remove_duplicate=False)} for m in (ours, theirs)]
    groups = [sorted(sorted(n for n in ids if ids[n] == one) for one in set(ids.values())) for ids in aliases]
    assert groups[0] == groups[1]
    assert [id(p) for p in found.replicated] == [
        id(dict(ours.named_parameters())[name])
        for name, p in theirs.named_parameters()
        if any(p is q for q in expected.replicated)
    ]


def compare(builds: list[Callable[[], Any]], parallel: dict[str, Any]) -> None:
    config = ParallelConfig.from_dict(parallel)
    meshes = Meshes.of(Layout.of(config, dist.get_world_size(), spec()), "cpu")
    for build in builds:
        torch.manual_seed(SEED)
        expected = parallelize(build(), meshes, config)
        after = torch.get_rng_state()
        torch.manual_seed(99)
        found = build_sharded(build, meshes, config, device=torch.device("cpu"), seed=SEED)
        assert torch.equal(torch.get_rng_state(), after)
        assert_same(found, expected)


ONE = {
    "experts": {"num_experts": 8, "intermediate_size": 8, "bias": True},
    "router": {"type": "recurrent", "top_k": 2, "state_size": 5},
    "shared_experts": {"num_experts": 1, "sigmoid_gate": True},
    "depth": {"capacity": 0.5},
    "balance": [{"type": "load_balancing", "coefficient": 0.1, "adaptive": {"capacity_factor": 1.0}}],
}
# Fewer experts than processes that share them: FSDP shards their width.
FEW = {"experts": {"num_experts": 2, "intermediate_size": 8}}
LAYOUTS = [
    (4, {}),
    (4, {"dp_replicate": 2, "ep": 4}),
    (4, {"ep": 2, "esp": 2}),
    (4, {"dp_replicate": 2, "esp": 2}),
    (2, {"ep": 2}),
    (2, {"partition_embedding": True}),
]


@pytest.mark.parametrize(("world", "parallel"), LAYOUTS)
def test_every_kind_of_layout(worlds: Worlds, world: int, parallel: dict[str, Any]) -> None:
    builds: list[Callable[[], Any]] = [
        functools.partial(build_moe, ONE, {}),
    ]
    if not parallel.get("partition_embedding"):
        builds.append(functools.partial(build_moe, ONE, {"tie_word_embeddings": True}))
    if parallel.get("ep", 1) <= 2:
        builds.append(functools.partial(build_moe, FEW, {}))
    if not parallel:
        builds += [functools.partial(build_stock, GPT2), functools.partial(build_stock, BACKBONE)]
    worlds(world, compare, builds, parallel)


class _LargestSum(TorchDispatchMode):
    """Bytes of the tensors with storage that operations made and that live at the same time, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.is_meta and not isinstance(result, DTensor):
            storage = result.untyped_storage()
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
                self.largest = max(self.largest, sum(self.live.values()))
        return result


def peak(build: Callable[[], Any], parallel: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes at the peak, of this process's part, and of the whole model."""
    config = ParallelConfig.from_dict(parallel)
    meshes = Meshes.of(Layout.of(config, dist.get_world_size(), spec()), "cpu")
    with _LargestSum() as mode:
        model = build_sharded(build, meshes, config, device=torch.device("cpu"), seed=SEED).model
    mine = sum(local(p).untyped_storage().nbytes() for p in model.parameters())
    return mode.largest, mine, sum(p.nbytes for p in model.parameters())


def test_memory_is_that_of_the_part_and_the_largest_module(worlds: Worlds) -> None:
    moe = {"experts": {"num_experts": 8, "intermediate_size": 64}}
    build = functools.partial(build_moe, moe, {"num_hidden_layers": 8})
    experts = 8 * 3 * 64 * 16 * 4
    for largest, mine, whole in worlds(4, peak, build, {"ep": 2}):
        assert whole > 8 * experts
        assert mine < largest < mine + 1.2 * experts < 0.6 * whole
