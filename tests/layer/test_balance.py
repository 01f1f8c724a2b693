"""Balance losses and load statistics: worked numbers, masks, scopes, and the difference from transformers' pooling."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moesaic.errors import ConfigError
from moesaic.layer import (
    BalanceLoss,
    LoadBalancing,
    MoESpec,
    Routing,
    RoutingContext,
    TopKConfig,
    ZLoss,
    expert_load,
    max_violation,
    routing_entropy,
)

LOSSES: list[BalanceLoss] = [
    LoadBalancing(coefficient=1.0),
    LoadBalancing(coefficient=1.0, scope="batch"),
    ZLoss(coefficient=1.0),
]


def route(logits_TN: Tensor, top_k: int, function: Literal["softmax", "sigmoid"] = "softmax") -> Routing:
    """The record of a router with identity weights."""
    num_experts = logits_TN.shape[-1]
    router = TopKConfig(top_k=top_k, score_function=function).build(num_experts, num_experts).to(logits_TN.dtype)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router(logits_TN)


def record(index: list[list[int]], scores: list[list[float]]) -> Routing:
    """A record with given picks and scores."""
    scores_TN = torch.tensor(scores, dtype=torch.float64)
    index_TK = torch.tensor(index)
    weight_TK = torch.ones(index_TK.shape, dtype=torch.float64)
    return Routing(index_TK, weight_TK, scores_TN.log(), scores_TN, scores_TN)


def random_logits(tokens: int, num_experts: int = 6) -> Tensor:
    return torch.randn(tokens, num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


# --- Load balancing ---------------------------------------------------------------------------------------------------


def test_worked_example_of_deepseekmoe_with_its_gradient() -> None:
    """f = (4/3, 4/3, 2/3, 2/3), P = (.283, .317, .25, .15): sum f P = 1.0667."""
    scores = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.1, 0.3], [0.35, 0.15, 0.45, 0.05]]
    logits_TN = torch.tensor(scores, dtype=torch.float64).log().requires_grad_()
    loss_B = LoadBalancing(coefficient=1.0).per_sequence(route(logits_TN, 2), RoutingContext())
    assert loss_B.tolist() == pytest.approx([16 / 15])
    loss_B.sum().backward()
    expected_TN = torch.tensor(
        [
            [0.026667, 0.02, -0.031111, -0.015556],
            [0.008889, 0.044444, -0.013333, -0.04],
            [0.038889, 0.016667, -0.05, -0.005556],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(logits_TN.grad, expected_TN, rtol=0, atol=1e-6)


def test_worked_example_of_deepseek_v3_normalises_sigmoid_scores() -> None:
    """f = (2, 1, 1, 0), P = (.35, .275, .275, .1): sum f P = 1.25."""
    routing = record([[0, 1], [2, 0]], [[0.9, 0.6, 0.3, 0.2], [0.5, 0.5, 0.8, 0.2]])
    assert LoadBalancing(coefficient=1.0).per_sequence(routing, RoutingContext()).tolist() == pytest.approx([1.25])


def test_four_layers_each_collapsed_on_another_expert() -> None:
    """Pooled over layers, as transformers does, collapse looks perfect; taken for each layer it is N."""
    collapsed = [torch.full((32, 4), 0.001 / 3, dtype=torch.float64) for _ in range(4)]
    for layer, scores_TN in enumerate(collapsed):
        scores_TN[:, layer] = 0.999
    logits = [scores_TN.log() for scores_TN in collapsed]
    for logits_TN in logits:
        (loss,) = LoadBalancing(coefficient=1.0).per_sequence(route(logits_TN, 1), RoutingContext()).tolist()
        assert loss == pytest.approx(3.996)
    pooled = load_balancing_loss_func(tuple(logits), num_experts=4, top_k=1)
    assert float(pooled) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_uniform_routing_gives_one(scope: Literal["sequence", "batch"]) -> None:
    index = [[token % 4, (token + 1) % 4] for token in range(8)]
    loss_B = LoadBalancing(coefficient=1.0, scope=scope).per_sequence(
        record(index, [[0.25] * 4] * 8), RoutingContext(batch_size=2)
    )
    assert loss_B.tolist() == pytest.approx([1.0, 1.0])


def test_loss_can_be_below_one_where_counts_and_scores_disagree() -> None:
    routing = record([[0], [0], [1]], [[0.51, 0.49], [0.51, 0.49], [0.0, 1.0]])
    assert LoadBalancing(coefficient=1.0).per_sequence(routing, RoutingContext()).item() < 1


def test_picks_of_no_expert_are_not_counted() -> None:
    scores = [[0.5, 0.5]] * 4
    loss = LoadBalancing(coefficient=1.0)
    # f = (2/4 * 2, 0, ...): two of four picks went to expert 0, the others nowhere.
    assert loss.per_sequence(record([[0], [0], [2], [2]], scores), RoutingContext()).item() == pytest.approx(0.5)
    assert loss.per_sequence(record([[2]] * 4, scores), RoutingContext()).item() == 0


def test_scope_decides_over_which_tokens_the_mean_is_taken() -> None:
    """Two sequences, each collapsed on another expert: unbalanced one by one, balanced together."""
    routing = record([[0], [0], [1], [1]], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    context = RoutingContext(batch_size=2)
    assert LoadBalancing(coefficient=1.0).per_sequence(routing, context).tolist() == [2.0, 2.0]
    assert LoadBalancing(coefficient=1.0, scope="batch").per_sequence(routing, context).tolist() == [1.0, 1.0]


def test_coefficient_is_left_to_the_caller() -> None:
    routing = route(random_logits(6), 2)
    one, ten = (LoadBalancing(coefficient=c).per_sequence(routing, RoutingContext()) for c in (1.0, 10.0))
    assert torch.equal(one, ten)


# --- z-loss -----------------------------------------------------------------------------------------------------------


def test_z_loss_closed_form() -> None:
    """Logits log(1), log(3): log sum exp = log 4; its derivative in logit i is 2 log 4 * softmax_i / T."""
    logits_TN = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss_B = ZLoss(coefficient=1.0).per_sequence(route(logits_TN, 1), RoutingContext())
    assert loss_B.tolist() == pytest.approx([(math.log(4) ** 2 + math.log(2) ** 2) / 2])
    loss_B.sum().backward()
    assert logits_TN.grad is not None
    assert logits_TN.grad[0].tolist() == pytest.approx([math.log(4) * 0.25, math.log(4) * 0.75])
    assert logits_TN.grad[1].tolist() == pytest.approx([math.log(2) * 0.5] * 2)


# --- Masks, for every loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_masked_tokens_count_neither_in_value_nor_in_gradient(loss: BalanceLoss) -> None:
    logits_TN = random_logits(8).requires_grad_()
    mask_T = torch.tensor([True, True, False, False, True, True, True, False])
    context = RoutingContext(batch_size=2, mask_T=mask_T)
    value_B = loss.per_sequence(route(logits_TN, 2), context)
    (gradient_TN,) = torch.autograd.grad(value_B.sum(), logits_TN)
    assert not gradient_TN[~mask_T].any()
    assert gradient_TN[mask_T].any(-1).all()
    changed_TN = torch.where(mask_T[:, None], logits_TN, -logits_TN)
    torch.testing.assert_close(loss.per_sequence(route(changed_TN, 2), context), value_B)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_full_mask_equals_no_mask(loss: BalanceLoss) -> None:
    routing = route(random_logits(8), 2)
    masked_B = loss.per_sequence(routing, RoutingContext(batch_size=2, mask_T=torch.ones(8, dtype=torch.bool)))
    torch.testing.assert_close(masked_B, loss.per_sequence(routing, RoutingContext(batch_size=2)))


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[2]], ids=repr)
def test_sequence_of_padding_gives_zero_and_the_other_is_untouched(loss: BalanceLoss) -> None:
    logits_TN = random_logits(8).requires_grad_()
    mask_T = torch.tensor([False] * 4 + [True] * 4)
    value_B = loss.per_sequence(route(logits_TN, 2), RoutingContext(batch_size=2, mask_T=mask_T))
    assert value_B[0] == 0
    torch.testing.assert_close(value_B[1:], loss.per_sequence(route(logits_TN[4:], 2), RoutingContext()))
    (gradient_TN,) = torch.autograd.grad(value_B.sum(), logits_TN)
    assert gradient_TN.isfinite().all()
    assert not gradient_TN[:4].any()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_nothing_but_padding_gives_zero(loss: BalanceLoss) -> None:
    routing = route(random_logits(8), 2, "sigmoid")
    context = RoutingContext(batch_size=2, mask_T=torch.zeros(8, dtype=torch.bool))
    assert loss.per_sequence(routing, context).tolist() == [0.0, 0.0]


def test_scores_that_underflow_to_zero_give_no_nan() -> None:
    logits_TN = torch.full((3, 4), -200.0, requires_grad=True)
    loss_B = LoadBalancing(coefficient=1.0).per_sequence(route(logits_TN, 2, "sigmoid"), RoutingContext())
    assert loss_B.tolist() == [0.0]
    (gradient_TN,) = torch.autograd.grad(loss_B.sum(), logits_TN)
    assert gradient_TN.isfinite().all()


# --- Statistics -------------------------------------------------------------------------------------------------------


def test_expert_load_counts_real_picks() -> None:
    routing = record([[0, 1], [1, 4], [3, 1]], [[0.25] * 4] * 3)
    assert expert_load(routing).tolist() == [1, 3, 0, 1]
    assert expert_load(routing, torch.tensor([True, True, False])).tolist() == [1, 2, 0, 0]
    assert expert_load(routing).dtype == torch.int64


@pytest.mark.parametrize(
    ("load", "violation", "entropy"),
    [
        ([6, 6, 6, 6], 0.0, 1.0),
        ([10, 6, 8, 0], 2 / 3, (10 * math.log(2.4) + 6 * math.log(4) + 8 * math.log(3)) / 24 / math.log(4)),
        ([24, 0, 0, 0], 3.0, 0.0),
        ([12, 12, 0, 0], 1.0, 0.5),
        ([0, 0, 0, 0], 0.0, 0.0),
        ([5], 0.0, 0.0),
    ],
)
def test_load_statistics(load: list[int], violation: float, entropy: float) -> None:
    assert max_violation(torch.tensor(load)).item() == pytest.approx(violation)
    assert routing_entropy(torch.tensor(load)).item() == pytest.approx(entropy)


# --- Configuration ----------------------------------------------------------------------------------------------------

BASE = {"experts": {"num_experts": 4, "intermediate_size": 8}, "router": {"type": "top_k", "top_k": 2}}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "load_balancing"}, r"balance\.0\.coefficient = None is required"),
        (
            {"type": "load_balancing", "coefficient": -1},
            r"balance\.0\.coefficient = -1 is not valid; .*greater than or",
        ),
        ({"type": "z_loss", "coefficient": math.inf}, r"balance\.0\.coefficient = inf is not valid; .*finite number"),
        (
            {"type": "switch", "coefficient": 1},
            r"balance\.0\.type = 'switch' .*choose one of 'load_balancing', 'z_loss'",
        ),
        ({"coefficient": 1}, r"balance\.0\.type = None is required"),
        (
            {"type": "load_balancing", "coefficient": 1, "scope": "token"},
            r"balance\.0\.scope = 'token' is not one of the choices; choose one of 'sequence' or 'batch'",
        ),
    ],
)
def test_bad_balance_entry_is_refused_by_name(entry: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        MoESpec.from_dict({**BASE, "balance": [entry]})


def test_losses_are_named_by_their_type() -> None:
    spec = MoESpec.from_dict(
        {**BASE, "balance": [{"type": "load_balancing", "coefficient": 0.01}, {"type": "z_loss", "coefficient": 0.001}]}
    )
    assert [loss.name for loss in spec.balance] == ["load_balancing", "z_loss"]
    assert isinstance(spec.balance[0], LoadBalancing)
    assert isinstance(spec.balance[1], ZLoss)
