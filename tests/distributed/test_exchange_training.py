"""Training with each exchange, and with split experts, equals training in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed.models import batches, model, spec
from tests.distributed.spawn import Worlds
from tests.distributed.test_parallelize import alone, together

from moesaic.dist import Layout, Meshes, ParallelConfig, Sharded, parallelize
from moesaic.errors import ConfigError

CAPACITY = {"capacity": {"factor": 1.0}, "shared_experts": {"num_experts": 1}}
BIASED = {"experts": {"num_experts": 8, "intermediate_size": 8, "bias": True}}
CASES = [
    pytest.param(4, {"ep": 4, "exchange": "padded", "all_to_all": "hierarchical"}, CAPACITY, id="padded-steps"),
    pytest.param(4, {"ep": 2, "esp": 2}, BIASED, id="ep2-esp2"),
]


@pytest.mark.parametrize(("world", "parallel", "moe"), CASES)
def test_steps_equal_one_process(worlds: Worlds, world: int, parallel: dict[str, Any], moe: dict[str, Any]) -> None:
    expected = torch.tensor(alone(moe, 1))
    for found in worlds(world, together, moe, 1, parallel, False):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)


def test_split_experts_with_recomputation(worlds: Worlds) -> None:
    expected = torch.tensor(alone(BIASED, 2))
    for found in worlds(2, together, BIASED, 2, {"esp": 2, "dp_replicate": 2}, True):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)


def spread(parallel: dict[str, Any], moe: dict[str, Any], module: Any) -> Sharded:
    config = ParallelConfig.from_dict(parallel)
    meshes = Meshes.of(Layout.of(config, dist.get_world_size(), spec(**moe)), "cpu")
    return parallelize(module, meshes, config)


def messages_between_nodes() -> dict[str, tuple[int, int]]:
    """Messages and bytes to the other of two nodes with two ranks each in a forward pass."""
    sent = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        for steps in ("auto", "hierarchical", "flat"):
            sharded = spread({"ep": 4, "all_to_all": steps}, {}, model())
            sharded.model(input_ids=batches(1)[0])
            count = sharded.traffic.take()
            sent[steps] = count.messages_between_nodes, count.bytes_between_nodes
    return sent


def test_groups_that_span_nodes_exchange_in_two_steps(worlds: Worlds) -> None:
    """Counts, rows, picks and rows back in two layers: one message each instead of two."""
    for sent in worlds(4, messages_between_nodes):
        assert sent["auto"] == sent["hierarchical"]
        assert (sent["auto"][0], sent["flat"][0]) == (8, 16)
        assert sent["flat"][1] > 0


def refusals() -> None:
    odd = model(spec(**BIASED), hidden_size=18, num_attention_heads=1)
    with pytest.raises(ConfigError, match=r"parallel\.esp = 4 does not divide the hidden size \(18\)"):
        spread({"esp": 4}, BIASED, odd)
    with pytest.raises(ConfigError, match=r"parallel\.exchange = 'padded'.*moe\.capacity\.factor"):
        spread({"ep": 2, "exchange": "padded"}, {}, model())


def test_what_does_not_fit_is_refused(worlds: Worlds) -> None:
    worlds(4, refusals)
