"""Sinkhorn routing: worked plans, a plain reference, loads, weights from the scores, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.layer import LayerLoad, RoutingContext, SinkhornConfig, SinkhornRouter
from moesaic.layer.routers.parts.plans import balanced_plan


def make_router(num_experts: int, *, training: bool, **fields: Any) -> SinkhornRouter:
    """A router with identity weights, in float64: its input is its logits."""
    router = SinkhornConfig.from_dict(fields).build(num_experts, num_experts).double().train(training)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


def plan(rows: list[list[float]], iterations: int) -> list[list[float]]:
    logits_GLN = torch.tensor([rows], dtype=torch.float64)
    mask_GL = torch.ones(logits_GLN.shape[:2], dtype=torch.bool)
    return balanced_plan(logits_GLN, mask_GL, iterations=iterations)[0].exp().tolist()


def test_worked_plan_of_two_tokens_and_two_experts() -> None:
    """With P = [[p, 1-p], [1-p, p]], p / (1 - p) = exp((a + d - b - c) / 2) is left of exp(logits) by scaling."""
    p = 1 / (1 + math.exp(-(3.0 + 1.0 - 1.0 - 2.0) / 2))
    found = plan([[3.0, 1.0], [2.0, 1.0]], 100)
    assert found[0] == pytest.approx([p, 1 - p])
    assert found[1] == pytest.approx([1 - p, p])


def reference_plan(rows: list[list[float]], iterations: int) -> list[list[float]]:
    """Sinkhorn's algorithm as it is written: scale columns, then rows."""
    shares = [[math.exp(value) for value in row] for row in rows]
    tokens, experts = len(rows), len(rows[0])
    for _ in range(iterations):
        sums = [sum(shares[token][expert] for token in range(tokens)) for expert in range(experts)]
        shares = [[row[expert] * tokens / experts / sums[expert] for expert in range(experts)] for row in shares]
        shares = [[value / sum(row) for value in row] for row in shares]
    return shares


@given(
    st.integers(1, 4).flatmap(
        lambda experts: st.lists(
            st.lists(st.integers(-8, 8).map(lambda step: step / 2), min_size=experts, max_size=experts),
            min_size=1,
            max_size=6,
        )
    ),
    st.integers(1, 5),
)
@settings(deadline=None, max_examples=150)
def test_plan_equals_the_plain_reference(rows: list[list[float]], iterations: int) -> None:
    for found, expected in zip(plan(rows, iterations), reference_plan(rows, iterations), strict=True):
        assert found == pytest.approx(expected, rel=1e-9)


def test_large_logits_do_not_overflow() -> None:
    logits_GLN = 1e4 * torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))
    assert balanced_plan(logits_GLN, torch.ones(1, 16, dtype=torch.bool), iterations=50).isfinite().all()


def test_shares_are_balanced_and_padding_has_none() -> None:
    logits_GLN = 2 * torch.randn(2, 12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask_GL = torch.ones(2, 12, dtype=torch.bool)
    mask_GL[1, 8:] = False
    plan_GLN = balanced_plan(logits_GLN, mask_GL, iterations=500).exp()
    torch.testing.assert_close(plan_GLN.sum(-1), mask_GL.double())
    expected_GN = torch.tensor([[3.0] * 4, [2.0] * 4], dtype=torch.float64)
    torch.testing.assert_close(plan_GLN.sum(1), expected_GN, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_collapsed_scores_are_spread_in_training_and_greedy_in_evaluation(scope: str) -> None:
    """Every token prefers expert 2; the plan takes that common part away."""
    x_TN = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_TN[:, 2] += 5
    context = RoutingContext(batch_size=2)
    training = make_router(4, training=True, scope=scope)(x_TN, context)
    load_N = LayerLoad.of(training).load_N
    assert int(load_N.max()) <= 1.5 * 16
    evaluation = make_router(4, training=False, scope=scope)(x_TN, context)
    assert torch.equal(evaluation.index_TK[:, 0], x_TN.argmax(-1))
    assert int(LayerLoad.of(evaluation).load_N.max()) > 3 * 16


def test_lower_temperature_brings_loads_closer_to_equal() -> None:
    x_TN = torch.randn(256, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_TN += 2 * torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loads = [
        LayerLoad.of(make_router(8, training=True, temperature=value, iterations=300)(x_TN)).load_N
        for value in (1.0, 0.05)
    ]
    assert int(loads[1].max() - loads[1].min()) < int(loads[0].max() - loads[0].min())
    assert int(loads[1].max()) <= 34


@pytest.mark.parametrize("training", [False, True])
def test_weights_come_from_the_scores_not_from_the_plan(training: bool) -> None:
    x_TN = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for function, scores_TN in (("softmax", x_TN.softmax(-1)), ("sigmoid", x_TN.sigmoid())):
        router = make_router(4, training=training, score_function=function, top_k=2)
        routing = router(x_TN)
        torch.testing.assert_close(routing.weight_TK, scores_TN.gather(1, routing.index_TK))
        assert torch.autograd.gradcheck(lambda x_TN, router=router: router(x_TN).weight_TK, x_TN)


def test_dependence_differs_by_mode() -> None:
    assert SinkhornConfig().depends_on(training=True) == {"later_tokens", "other_sequences"}
    assert SinkhornConfig(scope="sequence").depends_on(training=True) == {"later_tokens"}
    assert SinkhornConfig().depends_on(training=False) == frozenset()
    assert SinkhornConfig().unservable is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too many picks": ({"top_k": 9}, r"top_k = 9 is larger than num_experts \(8\); choose 1 to 8"),
    "no rounds": ({"iterations": 0}, r"iterations = 0 is not valid; input should be greater than 0"),
    "no entropy": ({"temperature": 0.0}, r"temperature = 0.0 is not valid; input should be greater than 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_configuration_is_refused_by_name(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ConfigError, match=f"^{message}"):
        SinkhornConfig.from_dict(fields).build(4, 8)
