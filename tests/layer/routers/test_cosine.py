"""Cosine routing: worked numbers, a slow reference of every form, invariances, sharp logits, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.layer.routers.plain import best, build, dot, sigmoid, softmax, tensor, tokens
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import CosineConfig, CosineRouter, LayerLoad


def make(training: bool = False, hidden_size: int = 4, num_experts: int = 6, **fields: Any) -> CosineRouter:
    router = build(CosineConfig.from_dict({"top_k": 2, **fields}), hidden_size, num_experts, training=training)
    assert isinstance(router, CosineRouter)
    if router.log_scale is not None:
        torch.nn.init.constant_(router.log_scale, -math.log(router.config.initial_temperature))
    return router


def test_worked_token() -> None:
    """X-MoE, arXiv 2204.09179: (3, 4) against (1, 0), (0, 2), (-5, 0), (0, -1) has cosines .6, .8, -.6, -.8."""
    router = make(hidden_size=2, num_experts=4, top_k=1, temperature=0.5)
    with torch.no_grad():
        router.projection_weight.copy_(torch.eye(2))
        router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-5.0, 0.0], [0.0, -1.0]]))
    routing = router(tensor([[3, 4]]))
    torch.testing.assert_close(routing.logits_TN, tensor([[1.2, 1.6, -1.2, -1.6]]))
    assert routing.index_TK.tolist() == [[1]]
    assert routing.weight_TK.item() == pytest.approx(softmax([1.2, 1.6, -1.2, -1.6])[1])
    assert routing.scores_TN[0].tolist() == pytest.approx(softmax([0.6 / 0.3, 0.8 / 0.3, -0.6 / 0.3, -0.8 / 0.3]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("function", "tau", "fixed"), [("softmax", 0.3, 0.3), ("sigmoid", 0.07, 0.07), ("softmax", 0.5, "learned")]
)
def test_paper_form_equals_the_slow_reference(function: str, tau: float, fixed: float | str, bias: bool) -> None:
    fields: dict[str, Any] = {"score_function": function, "projection_size": 3, "projection_bias": bias}
    if fixed == "learned":
        fields |= {"temperature": tau, "balance_temperature": "learned"}
    router, x_TD = make(**fields), tokens(20, 4)
    routing = router(x_TD)
    projection, experts = router.projection_weight.tolist(), router.weight.tolist()
    shift = [0.0] * 3 if router.projection_bias is None else router.projection_bias.tolist()
    for token, x in enumerate(x_TD.tolist()):
        low = [dot(row, x) + b for row, b in zip(projection, shift, strict=True)]
        cosines = [dot(low, expert) / math.sqrt(dot(low, low) * dot(expert, expert)) for expert in experts]
        logits = [value / tau for value in cosines]
        scores = softmax(logits) if function == "softmax" else [sigmoid(value) for value in logits]
        balance = scores if fixed == "learned" else softmax([value / float(fixed) for value in cosines])
        picks = best(cosines, 2)
        assert routing.index_TK[token].tolist() == picks
        assert routing.weight_TK[token].tolist() == pytest.approx([scores[pick] for pick in picks], rel=1e-9)
        assert routing.logits_TN[token].tolist() == pytest.approx(logits, rel=1e-9)
        assert routing.scores_TN[token].tolist() == pytest.approx(balance, rel=1e-9)


def test_released_form_equals_the_slow_reference() -> None:
    """torchscale: the token keeps its length, expert vectors do not, and nothing divides the product."""
    router, x_TD = make(form="released", top_k=1), tokens(20, 4)
    assert router.projection_weight.shape == (16, 4)
    assert {name for name, _ in router.named_parameters()} == {"projection_weight", "weight"}
    routing = router(x_TD)
    for token, x in enumerate(x_TD.tolist()):
        low = [dot(row, x) for row in router.projection_weight.tolist()]
        logits = [dot(low, expert) / math.sqrt(dot(expert, expert)) for expert in router.weight.tolist()]
        assert routing.logits_TN[token].tolist() == pytest.approx(logits, rel=1e-9)
        assert routing.scores_TN[token].tolist() == pytest.approx(softmax(logits), rel=1e-9)
        assert routing.weight_TK[token].item() == pytest.approx(max(softmax(logits)))


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_paper_form_does_not_depend_on_the_size_of_tokens_or_experts(function: str) -> None:
    router, x_TD = make(score_function=function), tokens(20, 4)
    expected = router(x_TD)
    with torch.no_grad():
        router.weight.mul_(torch.tensor([[0.01], [3.0], [1.0], [7.0], [50.0], [0.2]]))
    for factor in (1e-3, 1.0, 1e3):
        routing = router(factor * x_TD)
        assert torch.equal(routing.index_TK, expected.index_TK)
        torch.testing.assert_close(routing.weight_TK, expected.weight_TK)
        torch.testing.assert_close(routing.scores_TN, expected.scores_TN)


def test_released_form_depends_on_the_size_of_tokens() -> None:
    router, x_TD = make(form="released"), tokens(20, 4)
    assert not torch.allclose(router(3 * x_TD).weight_TK, router(x_TD).weight_TK)


def test_released_form_keeps_expert_vectors_at_length_1_5_after_each_step() -> None:
    router = make(form="released")
    before = router(tokens(20, 4))
    router.post_step(LayerLoad.of(before), 0.5)
    torch.testing.assert_close(router.weight.norm(dim=-1), torch.full((6,), 1.5, dtype=torch.float64))
    torch.testing.assert_close(router(tokens(20, 4)).weight_TK, before.weight_TK)


def test_balance_scores_keep_their_temperature_when_the_learned_one_moves() -> None:
    router, x_TD = make(), tokens(20, 4)
    before = router(x_TD)
    with torch.no_grad():
        router.log_scale.add_(1.0)  # type: ignore[union-attr]
    after = router(x_TD)
    torch.testing.assert_close(after.scores_TN, before.scores_TN)
    assert (after.weight_TK[:, 0] > before.weight_TK[:, 0]).all()


def test_sharpness_is_bounded() -> None:
    """Tutel clamps 1 / tau at 100."""
    router, x_TD = make(projection_size=3, temperature=0.02), tokens(20, 4)
    with torch.no_grad():
        router.log_scale.fill_(20.0)  # type: ignore[union-attr]
    assert 50 < router(x_TD).logits_TN.abs().max() <= 100.0001


def test_experts_are_told_apart_where_their_sigmoids_are_equal() -> None:
    """Cosines 1 and 0.96 at 1 / tau = 100 have sigmoids that are both 1 in float32."""
    router = make(hidden_size=2, num_experts=2, top_k=1, score_function="sigmoid", projection_size=2).float()
    with torch.no_grad():
        router.projection_weight.copy_(torch.eye(2))
        router.weight.copy_(torch.tensor([[0.96, 0.28], [1.0, 0.0]]))
        router.log_scale.fill_(9.0)  # type: ignore[union-attr]
    routing = router(torch.tensor([[1.0, 0.0]]))
    assert routing.index_TK.tolist() == [[1]]


def test_token_of_zeros_has_finite_gradients() -> None:
    router = make(training=True)
    x_TD = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(router(x_TD).weight_TK.square().sum(), [x_TD, *router.parameters()], allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_gradients(form: str) -> None:
    router = make(form=form, projection_size=3)
    names, values = zip(*router.named_parameters(), strict=True)

    def weights(x_TD: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        routing = torch.func.functional_call(router, dict(zip(names, parameters, strict=True)), (x_TD,))
        return routing.weight_TK, routing.scores_TN

    assert torch.autograd.gradcheck(weights, (tokens(4, 4).requires_grad_(), *values))


def test_starts_with_the_temperature_of_its_scores_and_half_as_many_dimensions_as_experts() -> None:
    for function, tau in (("softmax", 0.3), ("sigmoid", 0.07)):
        router = CosineConfig.from_dict({"top_k": 1, "score_function": function}).build(32, 10)
        assert router.projection_weight.shape == (5, 32)
        assert router.log_scale is not None
        assert router.log_scale.exp().item() == pytest.approx(1 / tau)


def test_released_form_starts_in_half_precision_too() -> None:
    router = CosineConfig(top_k=1, form="released").build(32, 8).bfloat16()
    router.reset_parameters()
    torch.testing.assert_close(router.weight.float().norm(dim=-1), torch.full((8,), 0.32), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"form": "released", "temperature": 0.3}, r"temperature = 0.3 has no effect in the released form"),
        ({"form": "released", "balance_temperature": 0.3}, r"balance_temperature = 0.3 has no effect"),
        ({"form": "released", "max_scale": 10.0}, r"max_scale = 10.0 has no effect"),
        ({"temperature": 0.005}, r"temperature = 0.005 is below 1 / max_scale \(0.01\), so that no gradient"),
        ({"form": "tutel"}, r"form = 'tutel' is not one of the choices"),
        ({"top_k": 1, "normalize_top_k": True}, r"normalize_top_k = True gives the only pick"),
    ],
)
def test_bad_configuration_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CosineConfig.from_dict({"top_k": 2, **fields})
