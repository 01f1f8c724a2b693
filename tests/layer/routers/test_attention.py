"""The attention router: worked numbers, a slow reference, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from tests.layer.routers.plain import best, build, dot, softmax, tensor, tokens

from moesaic.layer import AttentionConfig


def test_logits_are_attention_over_values() -> None:
    """Yuan 2.0-M32, arXiv 2405.17976: two experts, q = (1, -1), k = (log 3, 0), v = (4, 8)."""
    router = AttentionConfig(top_k=2).build(1, 2).double()
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0], [-1.0], [math.log(3)], [0.0], [4.0], [8.0]]))
    routing = router(tensor([[1.0]]))
    # Rows of attention: softmax(log 3, 0) = (3/4, 1/4) and softmax(-log 3, 0) = (1/4, 3/4).
    torch.testing.assert_close(routing.logits_TN, tensor([[5.0, 7.0]]))
    assert routing.index_TK.tolist() == [[1, 0]]


def test_equals_the_slow_reference() -> None:
    router, x_TD = build(AttentionConfig(top_k=2), 4, 5), tokens(30, 4)
    routing = router(x_TD)
    rows = router.get_parameter("weight").tolist()
    for token, x in enumerate(x_TD.tolist()):
        query, key, value = ([dot(row, x) for row in rows[start : start + 5]] for start in (0, 5, 10))
        logits = [dot(softmax([q * k for k in key]), value) for q in query]
        assert routing.logits_TN[token].tolist() == pytest.approx(logits, rel=1e-9, abs=1e-12)
        scores = softmax(logits)
        assert routing.index_TK[token].tolist() == best(scores, 2)
        assert routing.weight_TK[token].tolist() == pytest.approx([scores[e] for e in best(scores, 2)])


def test_queries_of_zero_leave_all_experts_equal() -> None:
    router = build(AttentionConfig(top_k=2), 4, 5)
    with torch.no_grad():
        router.get_parameter("weight")[:5] = 0
    routing = router(tokens(10, 4))
    torch.testing.assert_close(routing.scores_TN, torch.full((10, 5), 0.2, dtype=torch.float64))


def test_gradients() -> None:
    router = build(AttentionConfig(top_k=5), 4, 5)
    x_TD, weight = tokens(3, 4).requires_grad_(), router.get_parameter("weight")
    dense = lambda x, w: torch.func.functional_call(router, {"weight": w}, (x,)).scores_TN  # noqa: E731
    assert torch.autograd.gradcheck(dense, (x_TD, weight))


def test_parameters_are_three_rows_an_expert() -> None:
    assert AttentionConfig(top_k=1).build(7, 4).weight.shape == (12, 7)
