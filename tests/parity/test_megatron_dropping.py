"""Megatron-Core's token dropping as fields of ours: the same picks and weights are left.

Runs where Megatron-Core is installed (`pip install megatron-core`, 0.16.1 when this was written); it is no dependency.
"""

from __future__ import annotations

import pytest
import torch
from tests.layer.test_capacity import LOGITS, config_of, limit, route
from torch import Tensor

from moesaic.layer import Routing

moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")

TOKENS, EXPERTS = 64, 8


def dense(index_TK: Tensor, values_TK: Tensor, num_experts: int) -> Tensor:
    """Values at the picked experts, (T, N)."""
    values_TN = values_TK.new_zeros(len(index_TK), num_experts + 1)
    return values_TN.scatter(-1, index_TK, values_TK)[:, :num_experts]


def theirs(routing: Routing, factor: float, policy: str) -> Tensor:
    weight_TN = dense(routing.index_TK, routing.weight_TK, routing.num_experts)
    left_TN, _ = moe_utils.apply_router_token_dropping(
        weight_TN, weight_TN > 0, routing.top_k, capacity_factor=factor, drop_policy=policy
    )
    return left_TN


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_by_weight(k: int, normalize: bool, factor: float, seed: int) -> None:
    logits_TN = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    routing = route(logits_TN + torch.arange(EXPERTS) * 0.3, k, normalize=normalize and k > 1)
    limited = limit(routing, config_of(factor=factor, scope="batch", policy="weight"))
    assert limited.dropped_TK is not None
    assert limited.dropped_TK.any()
    torch.testing.assert_close(dense(limited.index_TK, limited.weight_TK, EXPERTS), theirs(routing, factor, "probs"))


def test_weights_are_left_as_they_were() -> None:
    """Where DeepSpeed gives 1, Megatron leaves 0.7311."""
    routing = route(LOGITS, 2, normalize=True)
    limited = limit(routing, config_of(factor=0.75, scope="batch", policy="weight"))
    ours_TN = dense(limited.index_TK, limited.weight_TK, 3)
    torch.testing.assert_close(ours_TN, theirs(routing, 0.75, "probs"))
    assert ours_TN[2, 1].item() == pytest.approx(0.7311, abs=5e-5)


def test_how_many_are_left_by_position() -> None:
    """Which ones is up to `torch.topk` among equal entries."""
    routing = route(LOGITS, 2)
    limited = limit(routing, config_of(factor=0.75, scope="batch"))
    ours_TN = dense(limited.index_TK, limited.weight_TK, 3)
    assert torch.equal((ours_TN > 0).sum(0), (theirs(routing, 0.75, "position") > 0).sum(0))
