"""Top-2 with a sampled second expert: worked numbers, frequencies of both policies, evaluation, refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.layer.routers.plain import identity, softmax, tensor, tokens

from moesaic.errors import ConfigError
from moesaic.layer import RoutingContext, SampledSecondConfig
from moesaic.layer.noise import uniform

CONTEXT = RoutingContext(seed=torch.tensor(11))
POLICIES = ["dispatch", "gumbel"]


def logits_of(scores: list[float]) -> list[float]:
    return [math.log(value) for value in scores]


@pytest.mark.parametrize("policy", POLICIES)
def test_evaluation_is_top_2_with_weights_that_sum_to_one(policy: str) -> None:
    router = identity(SampledSecondConfig.from_dict({"policy": policy}), 4)
    routing = router(tensor([logits_of([0.1, 0.6, 0.1, 0.2]), [0.0, 0.0, 0.0, 0.0]]), CONTEXT)
    assert routing.index_TK.tolist() == [[1, 3], [0, 1]]
    torch.testing.assert_close(routing.weight_TK, tensor([[0.75, 0.25], [0.5, 0.5]]))
    torch.testing.assert_close(routing.scores_TN, tensor([[0.1, 0.6, 0.1, 0.2], [0.25] * 4]))


def test_dispatch_runs_the_second_with_twice_its_weight_as_probability() -> None:
    """GShard, arXiv 2006.16668, algorithm 1: g1 = 0.75 stays so without the second expert."""
    router = identity(SampledSecondConfig(policy="dispatch"), 4, training=True)
    routing = router(tensor([logits_of([0.1, 0.6, 0.1, 0.2])] * 20_000), CONTEXT)
    skipped_T = routing.index_TK[:, 1] == 4
    assert skipped_T.double().mean().item() == pytest.approx(0.5, abs=0.015)
    assert (routing.index_TK[:, 0] == 1).all()
    assert (routing.index_TK[~skipped_T, 1] == 3).all()
    torch.testing.assert_close(routing.weight_TK[:, 0], torch.full((20_000,), 0.75, dtype=torch.float64))
    assert (routing.weight_TK[skipped_T, 1] == 0).all()
    torch.testing.assert_close(routing.weight_TK[~skipped_T, 1], 0.25 * torch.ones(int((~skipped_T).sum())).double())


def test_dispatch_equals_the_slow_reference() -> None:
    router = identity(SampledSecondConfig(policy="dispatch"), 5, training=True)
    x_TD = tokens(200, 5)
    routing = router(x_TD, CONTEXT)
    units = uniform(CONTEXT, router.layer, (200,), stream=0, like=x_TD).tolist()
    for token, (row, unit) in enumerate(zip(x_TD.tolist(), units, strict=True)):
        scores = softmax(row)
        first, second = sorted(range(5), key=lambda expert: -scores[expert])[:2]
        total = scores[first] + scores[second]
        runs = 2 * scores[second] / total > unit
        assert routing.index_TK[token].tolist() == [first, second if runs else 5]
        expected = [scores[first] / total, scores[second] / total if runs else 0.0]
        assert routing.weight_TK[token].tolist() == pytest.approx(expected, rel=1e-12)


def test_two_equal_experts_are_both_always_dispatched() -> None:
    router = identity(SampledSecondConfig(policy="dispatch"), 2, training=True)
    assert (router(torch.zeros(5000, 2).double(), CONTEXT).index_TK == torch.tensor([0, 1])).all()


def test_gumbel_draws_the_second_from_the_softmax_over_the_rest() -> None:
    """DeepSpeed's top2gating: the best always runs; the others follow p_j / (1 - p_1)."""
    scores = [0.1, 0.5, 0.15, 0.25]
    router = identity(SampledSecondConfig(policy="gumbel"), 4, training=True)
    routing = router(tensor([logits_of(scores)] * 40_000), CONTEXT)
    assert (routing.index_TK[:, 0] == 1).all()
    share_N = torch.bincount(routing.index_TK[:, 1], minlength=4) / 40_000
    torch.testing.assert_close(share_N, torch.tensor([0.2, 0.0, 0.3, 0.5]), rtol=0, atol=0.01)
    second_T = routing.index_TK[:, 1]
    expected_T = tensor(scores)[second_T] / (0.5 + tensor(scores)[second_T])
    torch.testing.assert_close(routing.weight_TK[:, 1], expected_T)
    assert routing.selection_TN.isfinite().all()


@pytest.mark.parametrize("policy", POLICIES)
def test_draws_differ_by_seed_and_layer_but_repeat(policy: str) -> None:
    router = identity(SampledSecondConfig.from_dict({"policy": policy}), 8, training=True)
    x_TD = tokens(100, 8)
    first = router(x_TD, CONTEXT).index_TK
    assert torch.equal(router(x_TD, CONTEXT).index_TK, first)
    assert not torch.equal(router(x_TD, replace(CONTEXT, seed=torch.tensor(12))).index_TK, first)
    router.layer = 1
    assert not torch.equal(router(x_TD, CONTEXT).index_TK, first)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradient_of_the_weights(policy: str) -> None:
    router = identity(SampledSecondConfig.from_dict({"policy": policy}), 5, training=True)
    x_TD = tokens(6, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: router(x, CONTEXT).weight_TK, (x_TD,))


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="needs two experts, not num_experts = 1; use top_k"):
        SampledSecondConfig().build(4, 1)
    with pytest.raises(ConfigError, match="policy = 'random' is not one of the choices"):
        SampledSecondConfig.from_dict({"policy": "random"})
