"""BASE: the assignment is the best balanced one (brute force, scipy), deterministic, and only used in training."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import BaseAssignmentConfig, BaseAssignmentRouter, LayerLoad, RoutingContext
from moesaic.layer.routers.parts.balanced_assignment import balanced_assignment


def assign(scores_TN: Tensor) -> Tensor:
    return balanced_assignment(scores_TN.unsqueeze(0), torch.ones(1, len(scores_TN), dtype=torch.bool)).squeeze(0)


def total(scores_TN: Tensor, index_T: Tensor) -> float:
    return float(scores_TN.double().gather(1, index_T.unsqueeze(1)).sum())


def make_router(num_experts: int, *, training: bool, **fields: Any) -> BaseAssignmentRouter:
    """A router with identity weights, in float64: its input is its logits."""
    router = BaseAssignmentConfig.from_dict(fields).build(num_experts, num_experts).double().train(training)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


# --- The assignment ---------------------------------------------------------------------------------------------------


def test_worked_example_of_a_displaced_token() -> None:
    """All four tokens prefer expert 0; the two that lose least by expert 1 go there: 5 + 4 + 3.5 + 1 = 13.5."""
    scores_TN = torch.tensor([[5.0, 1.0], [4.0, 3.5], [4.0, 0.0], [2.0, 1.0]])
    assert assign(scores_TN).tolist() == [0, 1, 0, 1]


def test_chain_of_moves() -> None:
    """The best way to relieve expert 0 passes through expert 1: 0 gives to 1, and 1 to 2."""
    scores_TN = torch.tensor([[9.0, 8.0, 0.0], [9.0, 0.0, 0.0], [0.0, 9.0, 8.0]])
    assert assign(scores_TN).tolist() == [1, 0, 2]


@given(
    st.integers(1, 3).flatmap(
        lambda experts: st.lists(
            st.lists(st.integers(-3, 3), min_size=experts, max_size=experts), min_size=1, max_size=7
        )
    )
)
@settings(deadline=None, max_examples=150)
def test_equals_brute_force_also_with_ties_and_uneven_loads(rows: list[list[int]]) -> None:
    scores_TN = torch.tensor(rows, dtype=torch.float64)
    tokens, experts = scores_TN.shape
    index_T = assign(scores_TN)
    allowed = {tokens // experts, -(-tokens // experts)}
    assert set(torch.bincount(index_T, minlength=experts).tolist()) <= allowed
    best = max(
        sum(rows[token][expert] for token, expert in enumerate(choice))
        for choice in itertools.product(range(experts), repeat=tokens)
        if {Counter(choice)[expert] for expert in range(experts)} <= allowed
    )
    assert total(scores_TN, index_T) == best


@pytest.mark.parametrize(
    ("tokens", "experts", "skew"),
    [(64, 8, 0.0), (256, 8, 4.0), (120, 24, 1.0), (100, 16, 1.0), (37, 5, 2.0), (5, 8, 1)],
)
def test_equals_scipy(tokens: int, experts: int, skew: float) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    generator = torch.Generator().manual_seed(tokens)
    scores_TN = torch.randn(tokens, experts, dtype=torch.float64, generator=generator)
    scores_TN += skew * torch.randn(experts, dtype=torch.float64, generator=generator)
    least, extra = divmod(tokens, experts)
    # Columns are places: `least` of each expert that must be taken and one that may be, by idle rows if not by tokens.
    places = torch.arange(experts).repeat(least + bool(extra))
    cost = scores_TN[:, places]
    if extra:
        idle = torch.full((experts - extra, len(places)), -1e6, dtype=torch.float64)
        idle[:, least * experts :] = 0
        cost = torch.cat([cost, idle])
    row, column = optimize.linear_sum_assignment(cost.numpy(), maximize=True)
    expected_T = places[torch.from_numpy(column)[:tokens]]
    assert row.tolist() == list(range(len(cost)))
    index_T = assign(scores_TN)
    assert total(scores_TN, index_T) == pytest.approx(total(scores_TN, expected_T), rel=1e-12)
    assert torch.equal(index_T, expected_T)  # no two totals are equal here


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_scale_and_price_of_experts_do_not_matter(scale: float) -> None:
    """What all tokens give an expert alike changes the total of every balanced assignment alike."""
    generator = torch.Generator().manual_seed(0)
    scores_TN = torch.randn(48, 6, dtype=torch.float64, generator=generator)
    shifted_TN = scale * (scores_TN + 3 * torch.randn(6, dtype=torch.float64, generator=generator))
    assert torch.equal(assign(shifted_TN), assign(scores_TN))


def test_equal_scores_are_assigned_the_same_way_each_time() -> None:
    index_T = assign(torch.zeros(50, 8))
    assert torch.bincount(index_T).tolist().count(6) == 6
    assert torch.bincount(index_T).tolist().count(7) == 2
    assert torch.equal(assign(torch.zeros(50, 8)), index_T)


def test_groups_are_assigned_one_by_one_and_padding_gets_no_expert() -> None:
    scores_GLN = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    mask_GL = torch.ones(3, 8, dtype=torch.bool)
    mask_GL[1, ::2] = False
    mask_GL[2] = False
    index_GL = balanced_assignment(scores_GLN, mask_GL)
    assert torch.equal(index_GL[0], assign(scores_GLN[0]))
    assert torch.equal(index_GL[1, 1::2], assign(scores_GLN[1, 1::2]))
    assert (index_GL[~mask_GL] == 4).all()


# --- The router -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_loads_are_equal_in_training_and_greedy_in_evaluation(scope: str) -> None:
    x_TN = torch.randn(24, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_TN[:, 2] += 3
    context = RoutingContext(batch_size=3)
    training = make_router(4, training=True, scope=scope)(x_TN, context)
    assert LayerLoad.of(training).load_N.tolist() == [6] * 4
    if scope == "sequence":
        for start in (0, 8, 16):
            assert torch.bincount(training.index_TK[start : start + 8, 0]).tolist() == [2] * 4
    evaluation = make_router(4, training=False, scope=scope)(x_TN, context)
    assert torch.equal(evaluation.index_TK[:, 0], x_TN.argmax(-1))
    for routing in (training, evaluation):  # eq. 1: the weight is the sigmoid of the score
        torch.testing.assert_close(routing.weight_TK, x_TN.sigmoid().gather(1, routing.index_TK))


def test_gradient_is_that_of_the_sigmoid_of_the_assigned_scores() -> None:
    x_TN = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    router = make_router(3, training=True)
    assert torch.autograd.gradcheck(lambda x_TN: router(x_TN).weight_TK, x_TN)


def test_dependence_differs_by_mode() -> None:
    config = BaseAssignmentConfig()
    assert config.depends_on(training=True) == {"later_tokens", "other_sequences"}
    assert BaseAssignmentConfig(scope="sequence").depends_on(training=True) == {"later_tokens"}
    assert config.depends_on(training=False) == frozenset()
    assert config.unservable is None


def test_training_compiles_to_one_graph() -> None:
    router = make_router(4, training=True)
    x_TN = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x_TN).index_TK, router(x_TN).index_TK)


def test_bad_configuration_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="scope = 'world' is not one of the choices"):
        BaseAssignmentConfig.from_dict({"scope": "world"})
