"""Thresholds: worked numbers, a slow reference, straight-through gradients, tokens without an expert, diversity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.layer.routers.plain import build, by_expert, dot, sigmoid, tensor, tokens
from torch.utils.checkpoint import checkpoint

from moesaic.errors import ConfigError
from moesaic.layer import MoEBlock, MoESpec, RoutingContext, ThresholdConfig, ThresholdRouter
from moesaic.layer.balance import BalanceObjective
from moesaic.layer.routers.threshold import expert_diversity

N, D = 6, 4


def make(training: bool = False, num_experts: int = N, **fields: Any) -> ThresholdRouter:
    router = build(ThresholdConfig.from_dict(fields), D, num_experts, training=training)
    assert isinstance(router, ThresholdRouter)
    with torch.no_grad():
        router.log_scale.fill_(-math.log(router.config.temperature))
        router.threshold.mul_(0.3)
    return router


def axes(thresholds: list[float], training: bool = False) -> ThresholdRouter:
    """Experts along the axes of the input."""
    router = make(training, num_experts=D)
    with torch.no_grad():
        router.weight.copy_(torch.eye(D))
        router.threshold.copy_(tensor(thresholds))
    return router


def test_worked_tokens() -> None:
    """DYNMoE, arXiv 2405.14297: the mean of the experts whose cosine exceeds their threshold."""
    routing = axes([0.5, 0.5, 0.9, -0.1])(tensor([[3, 4, 0, 0], [0, 0, 5, 0], [1, 1, 1, -1]]))
    assert by_expert(routing, 0, D) == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])  # cosines .6, .8, 0, 0
    assert by_expert(routing, 1, D) == pytest.approx([0, 0, 0.5, 0.5])  # 0, 0, 1, 0
    assert by_expert(routing, 2, D) == pytest.approx([1, 0, 0, 0])  # .5 is not above .5: the best of three equals
    assert routing.index_TK[2].tolist().count(D) == 3


def test_token_without_an_expert_runs_none_in_training_and_the_best_in_evaluation() -> None:
    x_TD = tensor([[1, 2, 0, -1]])
    assert (axes([0.9] * 4, training=True)(x_TD).index_TK == D).all()
    routing = axes([0.9, 0.9, 0.9, -0.3])(x_TD)
    assert by_expert(routing, 0, D) == pytest.approx([0, 1, 0, 0])


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[float]], list[float], int | None, bool]:
    value = st.integers(-3, 3).map(float)
    row = st.lists(value, min_size=D, max_size=D).filter(any)
    rows = draw(st.lists(row, min_size=1, max_size=3))
    limits = draw(st.lists(st.integers(-9, 9).map(lambda step: step / 10 + 0.03), min_size=N, max_size=N))
    return rows, limits, draw(st.none() | st.integers(1, N)), draw(st.booleans())


@given(cases())
@settings(deadline=None)
def test_equals_the_slow_reference(case: tuple[list[list[float]], list[float], int | None, bool]) -> None:
    rows, limits, most, training = case
    router = make(training, max_experts=most)
    with torch.no_grad():
        router.threshold.copy_(tensor(limits))
    routing = router(tensor(rows))
    assert routing.top_k == (most or N)
    experts = router.weight.tolist()
    for token, x in enumerate(rows):
        cosines = [dot(x, expert) / math.sqrt(dot(x, x) * dot(expert, expert)) for expert in experts]
        margins = [value - limit for value, limit in zip(cosines, limits, strict=True)]
        order = sorted(range(N), key=lambda expert: -margins[expert])[: most or N]
        active = [expert for expert in order if margins[expert] > 0]
        if not active and not training:
            active = [max(range(N), key=lambda expert: cosines[expert])]
        expected = [1 / len(active) if expert in active else 0.0 for expert in range(N)]
        assert by_expert(routing, token, N) == pytest.approx(expected)
        assert routing.scores_TN[token].tolist() == pytest.approx([sigmoid(10 * value) for value in cosines])


def test_gradient_passes_straight_through_the_step() -> None:
    """Each weight moves s - t of its expert as if it were that difference, divided by the number of experts."""
    router, x_TD = make(training=True), tokens(12, D)
    upstream_TN = tokens(12, N, seed=3)
    routing = router(x_TD)
    runs_TK = routing.index_TK < N
    upstream_TK = upstream_TN.gather(-1, routing.index_TK.clamp(max=N - 1)) * runs_TK
    found = torch.autograd.grad((routing.weight_TK * upstream_TK).sum(), list(router.parameters()))

    scale = router.log_scale.exp()
    cosine_TN = torch.nn.functional.cosine_similarity(x_TD.unsqueeze(1), router.weight.unsqueeze(0), dim=-1)
    margin_TN = (cosine_TN * scale).sigmoid() - (router.threshold * scale).sigmoid()
    active_TN = (cosine_TN > router.threshold).double()
    share_TN = active_TN / active_TN.sum(-1, keepdim=True).clamp(min=1)
    expected = torch.autograd.grad((margin_TN * share_TN * upstream_TN).sum(), list(router.parameters()))
    torch.testing.assert_close(found, expected)
    assert all(gradient.abs().max() > 0 for gradient in found)


def test_experts_are_told_from_their_thresholds_where_sigmoids_saturate() -> None:
    """cos 1 against 0.96 at 1 / tau = 100: both sigmoids are 1 in float32."""
    router = axes([0.96] * D).float()
    with torch.no_grad():
        router.log_scale.fill_(9.0)
    assert by_expert(router(torch.tensor([[0.0, 1.0, 0.0, 0.0]])), 0, D) == [0, 1, 0, 0]


def test_raising_a_threshold_only_takes_tokens_away() -> None:
    router, x_TD = make(training=True), tokens(60, D)
    counts = []
    for limit in (-1.1, -0.5, 0.0, 0.5, 1.1):
        with torch.no_grad():
            router.threshold[2] = limit
        counts.append(int((router(x_TD).index_TK == 2).sum()))
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (60, 0)


def test_at_most_max_experts_run() -> None:
    router = make(max_experts=2, training=True)
    with torch.no_grad():
        router.threshold.fill_(-1.1)
    routing = router(tokens(30, D))
    assert routing.index_TK.shape == (30, 2)
    assert (routing.weight_TK == 0.5).all()


def test_half_of_the_experts_run_at_the_start() -> None:
    torch.manual_seed(0)
    router = ThresholdConfig().build(64, 16).train()
    torch.testing.assert_close(router.weight @ router.weight.T, torch.eye(16), rtol=0, atol=1e-5)
    active_T = (router(torch.randn(2000, 64)).index_TK < 16).sum(-1).double()
    assert active_T.mean().item() == pytest.approx(router.picks, rel=0.02)


def test_block_gives_the_mean_of_the_experts_that_run() -> None:
    spec = MoESpec.from_dict({"experts": {"num_experts": N, "intermediate_size": 3}, "router": {"type": "threshold"}})
    block, x_TD = MoEBlock(spec, D).double().eval(), tokens(8, D)
    block.gate.load_state_dict(make().state_dict())
    routing, y_TD = block.gate(x_TD), block(x_TD)
    for token in range(8):
        picks = [expert for expert in routing.index_TK[token].tolist() if expert < N]
        one_11 = torch.ones(1, 1, dtype=torch.float64)
        outputs = [block.experts(x_TD[token : token + 1], torch.tensor([[expert]]), one_11) for expert in picks]
        torch.testing.assert_close(y_TD[token], torch.stack(outputs).mean(0)[0])


# --- Diversity --------------------------------------------------------------------------------------------------------


def test_diversity_of_worked_vectors() -> None:
    """Cosine 1 for the only pair: the matrix minus 1 has two entries of 1; lengths 3 and 1 have mean 2."""
    assert expert_diversity(tensor([[3, 0], [1, 0]])).item() == pytest.approx(math.sqrt(2) + 2)
    assert expert_diversity(2 * torch.eye(4).double()).item() == pytest.approx(2.0)


def test_diversity_ignores_experts_that_do_not_exist() -> None:
    weight_ND = tensor([[1, 0], [0, 1], [1, 1]])
    assert expert_diversity(weight_ND, torch.tensor([True, True, False])).item() == pytest.approx(
        (2 + math.sqrt(2)) / 3
    )


def test_diversity_has_finite_gradients_at_its_minimum() -> None:
    weight_ND = torch.eye(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(expert_diversity(weight_ND), weight_ND)[0].isfinite().all()
    assert torch.autograd.gradcheck(expert_diversity, (tokens(4, 3).requires_grad_(),))


def test_record_offers_the_diversity_of_its_experts_for_every_token() -> None:
    router = make()
    routing = router(tokens(5, D))
    expected = expert_diversity(router.weight)
    torch.testing.assert_close(routing.auxiliary["diversity"], expected.expand(5))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_training_with_the_diversity_loss_spreads_the_experts_also_under_checkpointing(use_reentrant: bool) -> None:
    spec = MoESpec.from_dict(
        {
            "experts": {"num_experts": N, "intermediate_size": 3},
            "router": {"type": "threshold"},
            "balance": [{"type": "router", "loss": "diversity", "coefficient": 2.0}],
        }
    )
    found = []
    for checkpointed in (False, True):
        block, x_TD = MoEBlock(spec, D).double().train(), tokens(8, D).requires_grad_()
        torch.nn.init.zeros_(block.experts.down_proj)  # type: ignore[arg-type]
        block.gate.load_state_dict(make().state_dict())
        context = RoutingContext()
        y_TD = checkpoint(block, x_TD, context, use_reentrant=use_reentrant) if checkpointed else block(x_TD, context)
        objective = BalanceObjective(spec.balance, torch.ones(1, dtype=torch.float64))
        objective.add_to(y_TD.sum(), objective.by_name(context), context).backward()  # type: ignore[union-attr]
        weight_ND = block.gate.get_parameter("weight")
        found.append(weight_ND.grad)
    expected = make().weight
    (2.0 * expert_diversity(expected)).backward()
    torch.testing.assert_close(found[0], expected.grad)
    torch.testing.assert_close(found[1], expected.grad)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_experts": 7}, r"max_experts = 7 is larger than num_experts \(6\); choose 1 to 6"),
        ({"max_experts": 0}, r"max_experts = 0 is not valid"),
        ({"temperature": 0.001}, r"temperature = 0.001 is below 1 / max_scale \(0.01\)"),
    ],
)
def test_bad_configuration_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ThresholdConfig.from_dict(fields).build(D, N)
