"""Selection and weights of the routers that take the K best: equal to top-k's, refusals that all of them share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.layer.routers.plain import GRID, best, sigmoid, softmax, tensor, tokens

from moesaic.errors import ConfigError
from moesaic.layer import AttentionConfig, MLPConfig, NormalisedConfig, TopKConfig
from moesaic.layer.routers.parts.best_k import BestKConfig, BestKRouter

CONFIGS = [AttentionConfig, MLPConfig, NormalisedConfig]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 1},
        {"top_k": 3, "normalize_top_k": True, "scaling_factor": 2.5},
        {"top_k": 2, "softmax_over": "selected"},
        {"top_k": 3, "score_function": "sigmoid"},
        {"top_k": 3, "score_function": "sigmoid", "normalize_top_k": True, "stable_ties": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_same_logits_give_the_record_of_top_k(kind: type[BestKConfig], fields: dict[str, Any]) -> None:
    router, reference = kind.from_dict(fields).build(6, 6), TopKConfig.from_dict(fields).build(6, 6).double()
    assert isinstance(router, BestKRouter)
    with torch.no_grad():
        reference.weight.copy_(torch.eye(6))
    logits_TN = tokens(30, 6).requires_grad_()
    actual, expected = router.take_best(logits_TN), reference(logits_TN)
    for name in ("index_TK", "weight_TK", "scores_TN", "selection_TN"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-12, atol=0)
    upstream_TK = tokens(30, actual.top_k, seed=2)
    found = [torch.autograd.grad(routing.weight_TK, logits_TN, upstream_TK)[0] for routing in (actual, expected)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-15)


@given(st.lists(st.lists(GRID, min_size=5, max_size=5), min_size=1, max_size=3), st.integers(1, 5), st.booleans())
@settings(deadline=None)
def test_tied_logits_go_to_the_lower_index(rows: list[list[float]], top_k: int, gated: bool) -> None:
    config = AttentionConfig(top_k=top_k, score_function="sigmoid" if gated else "softmax")
    routing = config.build(2, 5).take_best(tensor(rows))
    for token, row in enumerate(rows):
        scores = [sigmoid(value) for value in row] if gated else softmax(row)
        picks = best(row, top_k)
        assert routing.index_TK[token].tolist() == picks
        assert routing.weight_TK[token].tolist() == pytest.approx([scores[pick] for pick in picks], rel=1e-12)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"top_k": 1, "normalize_top_k": True},
            r"normalize_top_k = True gives the only pick of top_k = 1 weight 1, .*can't teach the router; leave it out",
        ),
        ({"top_k": 1, "softmax_over": "selected"}, r"softmax_over = 'selected' gives the only pick of top_k = 1"),
        (
            {"top_k": 2, "softmax_over": "selected", "score_function": "sigmoid"},
            r"softmax_over = 'selected' needs softmax scores, not sigmoid; leave it at `all`",
        ),
        ({"top_k": 7}, r"top_k = 7 is larger than num_experts \(6\); choose 1 to 6"),
    ],
)
def test_bad_configuration_is_refused_by_name(kind: type[BestKConfig], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind.from_dict(fields).build(4, 6)
