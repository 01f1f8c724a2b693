"""Noisy top-k: worked numbers, the smooth load against redrawn noise and a slow reference, gradients, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moesaic.errors import ConfigError
from moesaic.layer import NoisyTopKConfig, NoisyTopKRouter, Routing, RoutingContext
from moesaic.layer.noise import normal
from moesaic.layer.routers.noisy_top_k import smooth_load

N, D, T = 6, 4, 40


def make_router(training: bool = True, **fields: Any) -> NoisyTopKRouter:
    router = NoisyTopKConfig.from_dict({"top_k": 2, **fields}).build(D, N).double().train(training)
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return router


def tokens(count: int = T) -> Tensor:
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


CONTEXT = RoutingContext(seed=torch.tensor(7))


# --- The gate (arXiv 1701.06538, eq. 3-5) -----------------------------------------------------------------------------


def test_weights_are_the_softmax_of_the_kept_noisy_logits() -> None:
    router, x_TD = make_router(), tokens()
    routing = router(x_TD, CONTEXT)
    assert router.noise_weight is not None
    draws_TN = normal(CONTEXT, router.layer, (T, N), stream=0, like=x_TD)
    h_TN = x_TD @ router.weight.T + draws_TN * F.softplus(x_TD @ router.noise_weight.T)
    kept_TN = torch.full((T, N), -math.inf, dtype=torch.float64)
    for token in range(T):
        order = sorted(range(N), key=lambda expert: -h_TN[token, expert].item())
        assert routing.index_TK[token].tolist() == order[:2]
        kept_TN[token, order[:2]] = h_TN[token, order[:2]].detach()
    torch.testing.assert_close(kept_TN.softmax(-1).gather(-1, routing.index_TK), routing.weight_TK.detach())
    torch.testing.assert_close(routing.weight_TK.sum(-1), torch.ones(T, dtype=torch.float64))
    torch.testing.assert_close(routing.selection_TN, h_TN.detach())


def test_without_noise_it_is_mixtral() -> None:
    router = make_router(training=False)
    with torch.no_grad():
        router.weight.copy_(torch.eye(N, D))
    routing = router(torch.tensor([[1.0, 3.0, 2.0, 0.0]], dtype=torch.float64))
    assert routing.index_TK.tolist() == [[1, 2]]
    expected = torch.tensor([[math.e / (1 + math.e), 1 / (1 + math.e)]], dtype=torch.float64)
    torch.testing.assert_close(routing.weight_TK.detach(), expected)
    assert routing.load_TN is not None
    assert routing.load_TN.tolist() == [[0, 1, 1, 0, 0, 0]]


def test_v_moe_takes_softmax_first_and_fixed_noise() -> None:
    """arXiv 2106.05974: noise of standard deviation 1 / N; weights are softmax values that are not renormalised."""
    router, x_TD = make_router(noise="fixed", softmax_over="all", noise_scale=2.0), tokens()
    assert {name for name, _ in router.named_parameters()} == {"weight"}
    routing = router(x_TD, CONTEXT)
    noisy_TN = routing.logits_TN + 2 / N * normal(CONTEXT, router.layer, (T, N), stream=0, like=x_TD)
    torch.testing.assert_close(routing.weight_TK, noisy_TN.softmax(-1).topk(2).values)
    torch.testing.assert_close(routing.scores_TN, routing.logits_TN.softmax(-1))


def test_starts_with_no_signal_and_some_noise() -> None:
    router = NoisyTopKConfig(top_k=2).build(D, N).train()
    assert not any(parameter.any() for parameter in router.parameters())
    routing = router(torch.ones(6000, D), CONTEXT)
    torch.testing.assert_close(routing.selection_TN.std().item(), math.log(2), rtol=0.03, atol=0)
    share_N = torch.bincount(routing.index_TK.flatten(), minlength=N) / 6000
    torch.testing.assert_close(share_N, torch.full((N,), 2 / N), rtol=0.1, atol=0)


# --- The smooth load (eq. 8-9) ----------------------------------------------------------------------------------------


def phi(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def test_smooth_load_of_one_token() -> None:
    """Noisy logits 3, 2, 1: without expert 0 the 1st largest is 2, without any other it is 3."""
    clean, noisy, std = [2.5, 2.0, 1.5], [3.0, 2.0, 1.0], [1.0, 0.5, 2.0]
    load = smooth_load(*(torch.tensor([row], dtype=torch.float64) for row in (clean, noisy, std)), k=1)
    assert load[0].tolist() == pytest.approx([phi(0.5), phi(-2.0), phi(-0.75)], rel=1e-12)


def reference_load(clean: list[float], noisy: list[float], std: list[float], k: int) -> list[float]:
    found = []
    for expert in range(len(clean)):
        others = sorted((value for other, value in enumerate(noisy) if other != expert), reverse=True)
        found.append(1.0 if k > len(others) else phi((clean[expert] - others[k - 1]) / std[expert]))
    return found


GRID = st.integers(-4, 4).map(lambda step: step / 2)


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.tuples(
            st.integers(1, n),
            st.lists(
                st.tuples(GRID, GRID, st.integers(1, 4).map(lambda step: step / 2)),
                min_size=n,
                max_size=n,
            ),
        )
    )
)
@settings(deadline=None)
def test_smooth_load_equals_the_slow_reference(case: tuple[int, list[tuple[float, float, float]]]) -> None:
    k, rows = case
    clean, noisy, std = (list(column) for column in zip(*rows, strict=True))
    actual = smooth_load(*(torch.tensor([row], dtype=torch.float64) for row in (clean, noisy, std)), k)
    assert actual[0].tolist() == pytest.approx(reference_load(clean, noisy, std, k), rel=1e-12)


def test_smooth_load_is_the_share_of_redraws_that_are_picked() -> None:
    clean_1N, std_1N = tokens(2)[:1].repeat(1, 2)[:, :N], torch.full((1, N), 0.7, dtype=torch.float64)
    noisy_1N = clean_1N + std_1N * tokens(3)[1:2].repeat(1, 2)[:, :N]
    load_1N = smooth_load(clean_1N, noisy_1N, std_1N, 2)
    draws = torch.randn(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for expert in range(N):
        redrawn = noisy_1N.repeat(len(draws), 1)
        redrawn[:, expert] = clean_1N[0, expert] + std_1N[0, expert] * draws
        share = (redrawn.topk(2).indices == expert).any(-1).double().mean()
        assert share.item() == pytest.approx(load_1N[0, expert].item(), abs=0.01)


def test_smooth_load_is_differentiable_and_finite_without_noise() -> None:
    clean_TN, noisy_TN = tokens(5).repeat(1, 2)[:, :N].requires_grad_(), tokens(8)[3:].repeat(1, 2)[:, :N]
    noisy_TN = (noisy_TN + torch.arange(N) * 0.01).requires_grad_()
    std_TN = torch.full((5, N), 0.6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: smooth_load(*args, 2), (clean_TN, noisy_TN, std_TN))
    silent_TN = torch.zeros(5, N, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(smooth_load(clean_TN, noisy_TN, silent_TN, 2).sum(), (clean_TN, noisy_TN, silent_TN))
    assert all(gradient.isfinite().all() for gradient in found)


def test_all_experts_are_certain_when_all_are_picked() -> None:
    routing = make_router(top_k=N)(tokens(), CONTEXT)
    assert routing.load_TN is not None
    assert (routing.load_TN == 1).all()


def test_the_record_holds_the_smooth_load_of_this_pass() -> None:
    router, x_TD = make_router(), tokens()
    routing = router(x_TD, CONTEXT)
    assert router.noise_weight is not None
    std_TN = F.softplus(x_TD @ router.noise_weight.T)
    torch.testing.assert_close(routing.load_TN, smooth_load(routing.logits_TN, routing.selection_TN, std_TN, 2))
    assert routing.load_TN is not None
    gradients = torch.autograd.grad(routing.load_TN.sum(0).square().sum(), list(router.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def load_cv2(routing: Routing) -> Tensor:
    assert routing.load_TN is not None
    load_N = routing.load_TN.sum(0)
    return load_N.var(correction=0) / load_N.mean().square()


def test_descending_the_load_balances_the_picks() -> None:
    """The squared coefficient of variation of the smooth load has gradients that move hard counts (eq. 11)."""
    router, x_TD = make_router(), tokens(300).abs()

    def imbalance() -> float:
        counts_N = torch.bincount(router(x_TD, CONTEXT).index_TK.flatten(), minlength=N).double()
        return (counts_N.std(correction=0) / counts_N.mean()).item()

    before = imbalance()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for step in range(100):
        optimizer.zero_grad()
        load_cv2(router(x_TD, replace(CONTEXT, seed=torch.tensor(step)))).backward()
        optimizer.step()
    assert imbalance() < 0.35 * before


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 1}, r"top_k = 1 gives the only pick weight 1.*choose 2 or more, or set softmax_over: all"),
        ({"top_k": 7}, r"top_k = 7 is larger than num_experts \(6\)"),
        ({"top_k": 2, "noise": "fixed", "noise_epsilon": 0.1}, r"noise_epsilon = 0.1 has no effect on fixed noise"),
        ({"top_k": 2, "noise_scale": 0.0}, r"noise_scale = 0.0 is not valid"),
    ],
)
def test_bad_configuration_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NoisyTopKConfig.from_dict(fields).build(D, N)
