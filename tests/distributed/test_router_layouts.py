"""Every router of the library with its experts on one process and spread over two and four: forward, backward, decoding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.spawn import Worlds
from tests.hf.router_models import extras, inputs, router_model
from tests.layer.router_rows import ROUTERS
from torch.distributed.tensor import DTensor

from moesaic.dist import Layout, Meshes, ParallelConfig, parallelize, sync_replicated

NEW_TOKENS = 5


def compare(name: str, parallel: dict[str, Any]) -> None:
    """On each rank: a model whose experts are spread gives what its copy that is whole gives for the same tokens."""
    whole: Any = router_model(name)
    spec = whole.config.spec
    whole.set_training_progress(0.5)
    config = ParallelConfig.from_dict(parallel)
    spread = copy.deepcopy(whole)
    sharded = parallelize(spread, Meshes.of(Layout.of(config, dist.get_world_size(), spec), "cpu"), config)

    ids_BS = inputs(seed=dist.get_rank())["input_ids"]
    extra = extras(whole, ids_BS)
    outputs = []
    for model in (whole, spread):
        torch.manual_seed(7)
        output = model.train()(input_ids=ids_BS, labels=ids_BS, num_items_in_batch=16 * dist.get_world_size(), **extra)
        output.loss.backward()
        outputs.append(output)
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=1e-5, atol=1e-6)

    sync_replicated(sharded.replicated)
    for (parameter_name, expected), found in zip(whole.named_parameters(), spread.parameters(), strict=True):
        summed = torch.zeros_like(expected) if expected.grad is None else expected.grad.clone()
        dist.all_reduce(summed)
        gradient = torch.zeros_like(summed) if found.grad is None else found.grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        torch.testing.assert_close(
            gradient, summed, rtol=1e-3, atol=1e-5, msg=lambda text, name=parameter_name: f"gradient of {name}: {text}"
        )
    if spec.unservable is None:
        tokens = [
            model.eval().generate(
                ids_BS,
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                synced_gpus=model is spread,
                **extra,
            )
            for model in (whole, spread)
        ]
        assert tokens[1].tolist() == tokens[0].tolist()


def rows() -> list[Any]:
    """Every row over two processes, and the first one of each router over four; the others of four are slow."""
    found, seen = [], set()
    for name, row in ROUTERS.items():
        kind = row.values["type"]
        marks = [pytest.mark.slow] if kind in seen else []
        seen.add(kind)
        found += [pytest.param(name, 2, id=f"{name}-2"), pytest.param(name, 4, id=f"{name}-4", marks=marks)]
    return found


@pytest.mark.parametrize(("name", "ep"), rows())
def test_spread_experts_give_what_whole_ones_give(worlds: Worlds, name: str, ep: int) -> None:
    worlds(ep, compare, name, {"ep": ep})
