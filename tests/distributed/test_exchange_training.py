"""Training with each exchange, and with split experts, equals training in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.distributed.spawn import run_ranks
from tests.distributed.test_parallelize import alone, together

CAPACITY = {"capacity": {"factor": 1.0}, "shared_experts": {"num_experts": 1}}
BIASED = {"experts": {"num_experts": 8, "intermediate_size": 8, "bias": True}}
CASES = [
    pytest.param(2, {"ep": 2, "exchange": "all_gather"}, {}, id="gather"),
    pytest.param(2, {"ep": 2, "exchange": "padded"}, CAPACITY, id="padded"),
    pytest.param(4, {"ep": 4, "exchange": "padded", "all_to_all": "hierarchical"}, CAPACITY, id="padded-steps"),
    pytest.param(2, {"esp": 2}, BIASED, id="esp2"),
    pytest.param(4, {"ep": 2, "esp": 2}, BIASED, id="ep2-esp2"),
]


@pytest.mark.parametrize(("world", "parallel", "moe"), CASES)
def test_twenty_steps_equal_one_process(world: int, parallel: dict[str, Any], moe: dict[str, Any]) -> None:
    expected = torch.tensor(alone(moe, 1))
    for found in run_ranks(world, together, moe, 1, parallel, False):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)


def test_split_experts_with_recomputation() -> None:
    expected = torch.tensor(alone(BIASED, 2))
    for found in run_ranks(2, together, BIASED, 2, {"esp": 2, "dp_replicate": 2}, True):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)
