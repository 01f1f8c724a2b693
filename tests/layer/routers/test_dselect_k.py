"""DSelect-k: the smooth step, binary codes, a slow reference, its two losses, training to a decision, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.layer.routers.plain import build, by_expert, dot, softmax, tensor, tokens

from moesaic.errors import ConfigError
from moesaic.layer import DSelectKConfig, DSelectKRouter
from moesaic.layer.routers.dselect_k import select, smooth_step

D = 4


def make(num_experts: int = 6, **fields: Any) -> DSelectKRouter:
    router = build(DSelectKConfig.from_dict({"num_selectors": 2, **fields}), D, num_experts)
    assert isinstance(router, DSelectKRouter)
    return router


def plain_step(z: float, gamma: float) -> float:
    if z <= -gamma / 2:
        return 0.0
    if z >= gamma / 2:
        return 1.0
    return -2 * z**3 / gamma**3 + 3 * z / (2 * gamma) + 0.5


# --- The smooth step and the codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_smooth_step(gamma: float) -> None:
    """arXiv 2106.03760, the smooth-step function: S(gamma / 4) = -1/32 + 3/8 + 1/2."""
    z = tensor([-5, -0.5, -0.25, 0, 0.25, 0.5, 5]) * gamma
    quarter = -1 / 32 + 3 / 8 + 1 / 2
    expected = [0, 0, 1 - quarter, 0.5, quarter, 1, 1]
    assert smooth_step(z, gamma).tolist() == pytest.approx(expected, abs=1e-15)
    assert smooth_step(z, gamma)[[0, 1, 5, 6]].tolist() == [0, 0, 1, 1]
    open_z = tensor([-0.4, -0.1, 0.3]).mul(gamma).requires_grad_()
    assert torch.autograd.gradcheck(lambda value: smooth_step(value, gamma), (open_z,))


def test_decided_bits_name_one_expert() -> None:
    """Highest bit first: 1 0 1 is expert 5, and 1 1 1 is none of six."""
    z_TSB = tensor([[[9, -9, 9], [-9, -9, -9], [9, 9, 9]]])
    r_TSN = select(z_TSB, 6, 1.0)
    assert r_TSN[0].tolist() == [[0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]


def test_open_bits_share_the_weight() -> None:
    r_TSN = select(tensor([[[0.0, 0.25]]]), 4, 1.0)
    high = -1 / 32 + 3 / 8 + 1 / 2
    assert r_TSN[0, 0].tolist() == pytest.approx([0.5 * (1 - high), 0.5 * high] * 2)


@given(st.integers(2, 9), st.data())
@settings(deadline=None)
def test_selection_equals_the_slow_reference(num_experts: int, data: st.DataObject) -> None:
    bits = math.ceil(math.log2(num_experts))
    values = st.integers(-8, 8).map(lambda step: step / 10)
    z = data.draw(st.lists(values, min_size=bits, max_size=bits))
    found = select(tensor([[z]]), num_experts, 1.0)[0, 0].tolist()
    for expert in range(num_experts):
        digits = format(expert, f"0{bits}b")
        factors = [plain_step(v, 1.0) if d == "1" else 1 - plain_step(v, 1.0) for v, d in zip(z, digits, strict=True)]
        assert found[expert] == pytest.approx(math.prod(factors), abs=1e-15)
        assert (found[expert] == 0) == (math.prod(factors) == 0)


# --- The router -------------------------------------------------------------------------------------------------------


def slow_weights(zs: list[list[float]], alphas: list[float], num_experts: int, gamma: float) -> list[float]:
    total = [0.0] * num_experts
    for z, share in zip(zs, softmax(alphas), strict=True):
        for expert in range(num_experts):
            digits = format(expert, f"0{len(z)}b")
            steps = [plain_step(v, gamma) for v in z]
            total[expert] += share * math.prod(s if d == "1" else 1 - s for s, d in zip(steps, digits, strict=True))
    return total


def test_conditioned_on_the_token_it_equals_the_slow_reference() -> None:
    router, x_TD = make(gamma=3.0), tokens(20, D)
    routing = router(x_TD)
    p: dict[str, Any] = {name: value.tolist() for name, value in router.named_parameters()}
    for token, x in enumerate(x_TD.tolist()):
        z = [dot(row, x) + b for row, b in zip(p["selector_weight"], p["selector_bias"], strict=True)]
        alphas = [dot(row, x) + b for row, b in zip(p["mixture_weight"], p["mixture_bias"], strict=True)]
        expected = slow_weights([z[:3], z[3:]], alphas, 6, 3.0)
        assert by_expert(routing, token, 6) == pytest.approx(expected, abs=1e-12)
        assert routing.scores_TN[token].tolist() == pytest.approx(expected, abs=1e-12)
        picked = {expert for expert in routing.index_TK[token].tolist() if expert < 6}
        assert picked == {expert for expert, weight in enumerate(expected) if weight > 0}


def test_static_gate_gives_all_tokens_the_same_experts() -> None:
    router = make(num_experts=8, conditioned_on="nothing", gamma=3.0)
    routing = router(tokens(5, D))
    z, alphas = router.selector.tolist(), router.mixture.tolist()
    expected = slow_weights([z[:3], z[3:]], alphas, 8, 3.0)
    for token in range(5):
        assert by_expert(routing, token, 8) == pytest.approx(expected, abs=1e-12)
    assert {name for name, _ in router.named_parameters()} == {"selector", "mixture"}


def test_decided_selectors_run_exactly_their_experts() -> None:
    router = make(num_experts=8, conditioned_on="nothing")
    with torch.no_grad():
        router.selector.copy_(tensor([9, -9, 9, -9, 9, 9]))  # experts 5 and 3
        router.mixture.copy_(tensor([math.log(3), 0]))
    routing = router(tokens(2, D))
    assert routing.index_TK.tolist() == [[5, 3, *[8] * 6]] * 2
    torch.testing.assert_close(routing.weight_TK[:, :2], tensor([[0.75, 0.25]] * 2))


def test_fresh_router_is_nearly_undecided() -> None:
    torch.manual_seed(0)
    routing = DSelectKConfig(num_selectors=2, conditioned_on="nothing").build(D, 8)(torch.ones(1, D))
    torch.testing.assert_close(routing.scores_TN, torch.full((1, 8), 1 / 8), rtol=0.1, atol=0)


def test_gradients() -> None:
    router = make(gamma=8.0)
    names, values = zip(*router.named_parameters(), strict=True)

    def outputs(x_TD: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routing = torch.func.functional_call(router, dict(zip(names, parameters, strict=True)), (x_TD,))
        return routing.scores_TN, routing.auxiliary["selector_entropy"], routing.auxiliary["unreachable"]

    assert torch.autograd.gradcheck(outputs, (tokens(3, D).requires_grad_(), *values))


# --- Its losses -------------------------------------------------------------------------------------------------------


def test_entropy_counts_open_bits() -> None:
    """All bits open: each selector is uniform over 8 experts, log 8 each; decided: 0."""
    router = make(num_experts=8, conditioned_on="nothing")
    with torch.no_grad():
        router.selector.zero_()
    assert router(tokens(2, D)).auxiliary["selector_entropy"].tolist() == pytest.approx([2 * math.log(8)] * 2)
    with torch.no_grad():
        router.selector.fill_(9.0)
    assert router(tokens(2, D)).auxiliary["selector_entropy"].tolist() == [0, 0]


def test_mass_on_codes_without_an_expert_is_counted() -> None:
    """Six experts, all bits open: 6/8 of the mass is reachable, so 8/6 - 1 for each selector."""
    router = make(num_experts=6, conditioned_on="nothing")
    with torch.no_grad():
        router.selector.zero_()
    assert router(tokens(1, D)).auxiliary["unreachable"].item() == pytest.approx(2 / 3)
    assert make(num_experts=8)(tokens(4, D)).auxiliary["unreachable"].abs().max() < 1e-12
    with torch.no_grad():
        router.selector.fill_(9.0)  # expert 7 of six
    routing = router(tokens(1, D))
    assert (routing.index_TK == 6).all()
    assert routing.auxiliary["unreachable"].isfinite().all()


def test_training_decides_for_the_two_best_experts() -> None:
    """The loss prefers experts 1 and 4; the entropy loss makes both selectors decide."""
    torch.manual_seed(0)
    router = DSelectKConfig(num_selectors=2, conditioned_on="nothing").build(D, 6).double()
    targets = torch.eye(6, dtype=torch.float64)
    wanted = 0.5 * targets[1] + 0.5 * targets[4]
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        routing = router(tokens(1, D))
        loss = (routing.scores_TN[0] - wanted).square().sum()
        loss = loss + 0.02 * routing.auxiliary["selector_entropy"].sum() + 0.1 * routing.auxiliary["unreachable"].sum()
        loss.backward()
        optimizer.step()
    routing = router(tokens(1, D))
    assert sorted(routing.index_TK[0].tolist()) == [1, 4, 6, 6, 6, 6]
    assert routing.auxiliary["selector_entropy"].item() == 0


@pytest.mark.parametrize(
    ("fields", "experts", "message"),
    [
        ({"num_selectors": 9}, 8, r"num_selectors = 9 is larger than num_experts \(8\); choose 1 to 8"),
        ({"num_selectors": 1}, 1, r"needs two experts, not num_experts = 1"),
        ({"num_selectors": 1, "gamma": 0.0}, 8, r"gamma = 0.0 is not valid"),
        ({"num_selectors": 1, "conditioned_on": "task"}, 8, r"conditioned_on = 'task' is not one of the choices"),
    ],
)
def test_bad_configuration_is_refused_by_name(fields: dict[str, Any], experts: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DSelectKConfig.from_dict(fields).build(D, experts)
