"""Scheduled top-k: the same as top-k at every k, the schedule, the frozen gate, any k in evaluation, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import LayerLoad, ScheduledTopKConfig, ScheduledTopKRouter, TopKConfig

N, D, T = 6, 4, 50


def make_router(training: bool = True, **fields: Any) -> ScheduledTopKRouter:
    router = ScheduledTopKConfig.from_dict(fields).build(D, N).double().train(training)
    router.weight.data.copy_(torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return router


def tokens() -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(router: ScheduledTopKRouter, progress: float) -> None:
    router.post_step(LayerLoad.of(router(tokens())), progress)


@pytest.mark.parametrize("normalize_top_k", [False, True])
@pytest.mark.parametrize(("start", "end"), [(2, 6), (5, 1)])
def test_each_step_is_top_k_with_the_present_k(start: int, end: int, normalize_top_k: bool) -> None:
    router, x_TD = make_router(top_k={"start": start, "end": end}, normalize_top_k=normalize_top_k), tokens()
    for quarter in range(5):
        step(router, quarter / 4)
        k = start + (end - start) * quarter // 4
        plain = TopKConfig(top_k=k, normalize_top_k=normalize_top_k).build(D, N).double()
        plain.weight.data.copy_(router.weight)
        routing, expected = router(x_TD), plain(x_TD)
        assert torch.equal(routing.index_TK[:, :k], expected.index_TK)
        torch.testing.assert_close(routing.weight_TK[:, :k], expected.weight_TK)
        assert (routing.index_TK[:, k:] == N).all()
        assert not routing.weight_TK[:, k:].any()
    assert router.picks == end


def test_k_starts_where_the_schedule_does_and_is_saved() -> None:
    router = make_router(top_k={"start": 1, "end": 4})
    assert router.current_top_k.item() == 1
    step(router, 0.6)  # 2.8
    other = make_router(top_k={"start": 1, "end": 4})
    other.load_state_dict(router.state_dict())
    assert other.current_top_k.item() == 3


def test_frozen_gate_is_not_trained_but_saved() -> None:
    router = make_router(top_k={"start": 2, "end": 6}, frozen=True)
    assert not any(parameter.requires_grad for parameter in router.parameters())
    assert not router(tokens()).weight_TK.requires_grad
    assert make_router(top_k={"start": 2, "end": 6})(tokens()).weight_TK.requires_grad
    other = ScheduledTopKConfig.from_dict({"top_k": {"start": 2, "end": 6}, "frozen": True}).build(D, N).double()
    assert not torch.equal(other(tokens()).index_TK, router(tokens()).index_TK)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(tokens()).index_TK, router(tokens()).index_TK)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_evaluation_runs_any_k(k: int) -> None:
    """SMoE-Dropout's self-slimmable inference: the best k, whatever training has reached."""
    router = make_router(top_k={"start": 2, "end": 4}, evaluation_top_k=k)
    assert ((router(tokens()).index_TK < N).sum(-1) == 2).all()
    routing = router.eval()(tokens())
    assert ((routing.index_TK < N).sum(-1) == k).all()
    assert routing.index_TK.shape == (T, max(4, k))
    assert router.picks == k


def test_constant_k_skips_nothing() -> None:
    assert not make_router(top_k=2).config.may_skip
    assert make_router(top_k=2, evaluation_top_k=1).config.may_skip
    assert make_router(top_k={"start": 2, "end": 3}).config.refuses_capacity


def test_gradients_are_those_of_finite_differences() -> None:
    router = make_router(top_k={"start": 3, "end": 6}, normalize_top_k=True)
    assert torch.autograd.gradcheck(lambda x_TD: router(x_TD).weight_TK, tokens()[:6].requires_grad_())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 7}, r"top_k = 7 is larger than num_experts \(6\)"),
        ({"top_k": {"start": 1, "end": 8}}, r"top_k\.end = 8 is larger than num_experts \(6\)"),
        ({"top_k": {"start": 0, "end": 2}}, r"top_k\.start = 0.* is not a number of experts"),
        ({"top_k": {"start": 1, "end": 2.5}}, r"top_k\.end = 2.5 is not a number of experts"),
        ({"top_k": 2, "evaluation_top_k": 9}, r"evaluation_top_k = 9 is larger than num_experts \(6\)"),
    ],
)
def test_bad_config_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_router(**fields)
