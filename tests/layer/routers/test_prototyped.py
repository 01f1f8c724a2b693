"""Expert prototyping: worked numbers, a slow reference, independence of the groups, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.layer.routers.plain import GRID, best, identity, softmax, tensor, tokens

from moesaic.errors import ConfigError
from moesaic.layer import LoadBalancing, PrototypedConfig, RoutingContext


def test_each_group_gives_its_best_with_the_softmax_inside_it() -> None:
    """M6-T, arXiv 2105.15082: y = sum over groups of p^z_a f_{z,a}, a the best of the group."""
    router = identity(PrototypedConfig(num_groups=2), 6)
    logits = [math.log(0.2), math.log(0.5), math.log(0.3), math.log(4), math.log(2), math.log(2)]
    routing = router(tensor([logits]))
    assert routing.index_TK.tolist() == [[1, 3]]
    torch.testing.assert_close(routing.weight_TK, tensor([[0.5, 0.5]]))
    torch.testing.assert_close(routing.scores_TN, tensor([[0.2, 0.5, 0.3, 0.5, 0.25, 0.25]]))


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, list[list[float]]]:
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    row = st.lists(GRID, min_size=groups * size, max_size=groups * size)
    return groups, size, draw(st.integers(1, size)), draw(st.lists(row, min_size=1, max_size=3))


@given(cases())
@settings(deadline=None)
def test_equals_the_slow_reference(case: tuple[int, int, int, list[list[float]]]) -> None:
    groups, size, k, rows = case
    router = identity(PrototypedConfig(num_groups=groups, top_k_in_group=k), groups * size)
    routing = router(tensor(rows))
    assert routing.top_k == groups * k
    for token, row in enumerate(rows):
        picks, weights = [], []
        for start in range(0, len(row), size):
            scores = softmax(row[start : start + size])
            inside = best(scores, k)
            picks += [start + index for index in inside]
            weights += [scores[index] for index in inside]
        assert routing.index_TK[token].tolist() == picks
        assert routing.weight_TK[token].tolist() == pytest.approx(weights, rel=1e-12)


def test_groups_do_not_influence_each_other() -> None:
    router, logits_TN = identity(PrototypedConfig(num_groups=2), 8), tokens(20, 8)
    changed_TN = logits_TN.clone()
    changed_TN[:, 4:] = -5 * changed_TN[:, 4:]
    one, two = router(logits_TN), router(changed_TN)
    assert torch.equal(one.index_TK[:, 0], two.index_TK[:, 0])
    assert torch.equal(one.weight_TK[:, 0], two.weight_TK[:, 0])


def test_one_group_is_top_k() -> None:
    grouped = identity(PrototypedConfig(num_groups=1, top_k_in_group=3), 6)(tokens(20, 6))
    weights_TK, index_TK = tokens(20, 6).softmax(-1).topk(3)
    assert torch.equal(grouped.index_TK, index_TK)
    torch.testing.assert_close(grouped.weight_TK, weights_TK)


def test_balanced_groups_have_loss_one() -> None:
    """Uniform scores, and every expert the best of its group equally often."""
    logits_TN = 1e-9 * torch.cat([torch.eye(4), torch.eye(4)], dim=-1).double()
    routing = identity(PrototypedConfig(num_groups=2), 8)(logits_TN)
    loss = LoadBalancing(coefficient=1.0).per_sequence(routing, RoutingContext())
    assert loss.item() == pytest.approx(1.0)


def test_gradient_of_the_weights() -> None:
    router = identity(PrototypedConfig(num_groups=2), 6)
    assert torch.autograd.gradcheck(lambda x: router(x).weight_TK, (tokens(5, 6).requires_grad_(),))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_groups": 3}, r"num_groups = 3 does not divide num_experts \(8\); choose from \[1, 2, 4\]"),
        ({"num_groups": 8}, r"num_groups = 8 leaves one expert a group, whose weight is always 1; give each group two"),
        ({"num_groups": 4, "top_k_in_group": 3}, r"top_k_in_group = 3 is larger than a group \(2\); choose 1 to 2"),
        ({"num_groups": 0}, r"num_groups = 0 is not valid"),
    ],
)
def test_bad_configuration_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrototypedConfig.from_dict(fields).build(4, 8)
