"""Sentence-level routing: each pool against a loop over tokens, padding, packing of the decision, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import RoutingContext, SentenceConfig, SentenceRouter

N, D, B, LENGTH = 5, 3, 3, 6


def make_router(**fields: Any) -> SentenceRouter:
    router = SentenceConfig.from_dict({"top_k": 2, **fields}).build(D, N).double()
    router.weight.data.copy_(torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return router


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(B * LENGTH, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pooled(x_LD: Tensor, real: list[bool], token: int, pool: str) -> Tensor:
    """What the gate reads for one token of one sequence."""
    seen = [
        x
        for place, (x, keep) in enumerate(zip(x_LD, real, strict=True))
        if keep and (place <= token or pool != "prefix")
    ]
    if pool == "first":
        seen = seen[:1]
    return torch.stack(seen).mean(0) if seen else torch.zeros(D, dtype=torch.float64)


@given(masks=st.lists(st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH), min_size=B, max_size=B))
@settings(deadline=None, max_examples=25)
@pytest.mark.parametrize("pool", ["sequence", "prefix", "first"])
def test_gate_reads_the_pool(pool: str, masks: list[list[bool]]) -> None:
    router, x_TD = make_router(pool=pool), tokens()
    x_TD[~torch.tensor(masks).flatten()] = float("nan")  # padding may hold anything
    routing = router(x_TD, RoutingContext(batch_size=B, mask_T=torch.tensor(masks).flatten()))
    for sequence, real in enumerate(masks):
        x_LD = x_TD[sequence * LENGTH : (sequence + 1) * LENGTH]
        for token in range(LENGTH):
            logits_N = router.weight @ pooled(x_LD, real, token, pool)
            row = sequence * LENGTH + token
            torch.testing.assert_close(routing.logits_TN[row], logits_N)
            if real[token]:
                order = sorted(range(N), key=lambda expert: -logits_N[expert].item())[:2]
                assert routing.index_TK[row].tolist() == order
                torch.testing.assert_close(routing.weight_TK[row], logits_N.softmax(0)[order])


@pytest.mark.parametrize("pool", ["sequence", "first"])
def test_a_sequence_has_one_decision(pool: str) -> None:
    routing = make_router(pool=pool)(tokens(), RoutingContext(batch_size=B))
    index_BLK = routing.index_TK.view(B, LENGTH, 2)
    assert torch.equal(index_BLK, index_BLK[:, :1].expand_as(index_BLK))
    assert len({tuple(experts) for experts in index_BLK[:, 0].tolist()}) > 1


def test_prefix_of_one_token_is_the_token() -> None:
    x_TD = tokens()
    prefix, sequence = make_router(pool="prefix"), make_router(pool="sequence")
    routing = prefix(x_TD, RoutingContext(batch_size=B))
    torch.testing.assert_close(routing.logits_TN[::LENGTH], x_TD[::LENGTH] @ prefix.weight.T)
    whole = sequence(x_TD, RoutingContext(batch_size=B))
    torch.testing.assert_close(routing.logits_TN[LENGTH - 1 :: LENGTH], whole.logits_TN[::LENGTH])


@pytest.mark.parametrize("pool", ["sequence", "prefix", "first"])
def test_gradients_are_those_of_finite_differences(pool: str) -> None:
    router, context = make_router(pool=pool, normalize_top_k=True), RoutingContext(batch_size=B)
    assert torch.autograd.gradcheck(lambda x_TD: router(x_TD, context).weight_TK, tokens().requires_grad_())


def test_none_is_servable_and_each_says_why() -> None:
    assert "later tokens" in str(SentenceConfig(top_k=1).unservable)
    for pool in ("prefix", "first"):
        assert "which a cache does not hold" in str(SentenceConfig(top_k=1, pool=pool).unservable)


def test_too_many_picks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"top_k = 6 is larger than num_experts \(5\)"):
        make_router(top_k=6)
