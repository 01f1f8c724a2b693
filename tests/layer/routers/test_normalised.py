"""Standardised logits: worked numbers, a slow reference, invariances, tokens without a preference."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from tests.layer.routers.plain import best, build, dot, identity, softmax, tensor, tokens

from moesaic.errors import ConfigError
from moesaic.layer import NormalisedConfig


def test_worked_token() -> None:
    """Skywork-MoE, arXiv 2406.06563: logits 1, 2, 3 have mean 2 and deviation sqrt(2/3)."""
    routing = identity(NormalisedConfig(top_k=2, scale=2.0), 3)(tensor([[1, 2, 3]]))
    step = 2 / math.sqrt(2 / 3)
    torch.testing.assert_close(routing.logits_TN, tensor([[-step, 0, step]]))
    expected = softmax([-step, 0, step])
    assert routing.index_TK.tolist() == [[2, 1]]
    assert routing.weight_TK[0].tolist() == pytest.approx([expected[2], expected[1]])


def test_equals_the_slow_reference() -> None:
    router, x_TD = build(NormalisedConfig(top_k=2, scale=0.7), 4, 6), tokens(30, 4)
    routing = router(x_TD)
    rows, bias = router.get_parameter("weight").tolist(), router.get_parameter("bias").tolist()
    for token, x in enumerate(x_TD.tolist()):
        raw = [dot(row, x) + shift for row, shift in zip(rows, bias, strict=True)]
        mean, deviation = statistics.fmean(raw), statistics.pstdev(raw)
        logits = [0.7 * (value - mean) / deviation for value in raw]
        assert routing.logits_TN[token].tolist() == pytest.approx(logits, rel=1e-8)
        assert routing.index_TK[token].tolist() == best(logits, 2)


def test_weights_do_not_depend_on_the_size_or_the_level_of_the_logits() -> None:
    router, x_TN = identity(NormalisedConfig(top_k=2), 6), tokens(20, 6)
    expected = router(x_TN)
    for other_TN in (x_TN * 7, x_TN * 0.01, x_TN + 3):
        routing = router(other_TN)
        assert torch.equal(routing.index_TK, expected.index_TK)
        torch.testing.assert_close(routing.weight_TK, expected.weight_TK, rtol=1e-5, atol=0)


def test_larger_scale_is_sharper() -> None:
    entropies = []
    for scale in (0.5, 1.0, 2.0, 4.0):
        scores_TN = identity(NormalisedConfig(top_k=2, scale=scale), 6)(tokens(20, 6)).scores_TN
        entropies.append(torch.special.entr(scores_TN).sum(-1).mean().item())
    assert entropies == sorted(entropies, reverse=True)


def test_token_without_a_preference_is_routed_evenly_with_finite_gradients() -> None:
    router = identity(NormalisedConfig(top_k=2), 4)
    x_TN = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    routing = router(x_TN)
    torch.testing.assert_close(routing.scores_TN, torch.full((3, 4), 0.25, dtype=torch.float64))
    assert torch.autograd.grad(routing.weight_TK.square().sum(), x_TN)[0].isfinite().all()


def test_gradient_of_the_weights() -> None:
    router = identity(NormalisedConfig(top_k=3), 5)
    assert torch.autograd.gradcheck(lambda x: router(x).weight_TK, (tokens(4, 5).requires_grad_(),))


@pytest.mark.parametrize(
    ("fields", "experts", "message"),
    [
        ({"top_k": 1}, 1, r"type = 'normalised' needs two experts: one logit has no deviation; use top_k"),
        ({"top_k": 2, "scale": 0.0}, 4, r"scale = 0.0 is not valid"),
        ({"top_k": 2, "epsilon": 0.0}, 4, r"epsilon = 0.0 is not valid"),
    ],
)
def test_bad_configuration_is_refused_by_name(fields: dict[str, Any], experts: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NormalisedConfig.from_dict(fields).build(4, experts)
