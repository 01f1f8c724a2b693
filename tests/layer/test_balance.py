"""Balance losses and load statistics: worked numbers, masks, scopes, and the difference from transformers' pooling."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moesaic.errors import ConfigError
from moesaic.layer import (
    BalanceLoss,
    CommunicationBalance,
    DeviceBalance,
    GlobalEntropy,
    Importance,
    LoadBalancing,
    LocalEntropy,
    MoESpec,
    MutualInformation,
    RouterConfig,
    RouterLoss,
    Routing,
    RoutingContext,
    SmoothLoad,
    SoftLoadBalancing,
    StableBalance,
    TopKConfig,
    ZLoss,
    expert_load,
    max_violation,
    routing_entropy,
)

# One value for each sequence from its own tokens alone.
SEQUENCE_LOSSES: list[BalanceLoss] = [
    LoadBalancing(coefficient=1.0),
    LoadBalancing(coefficient=1.0, counts="first"),
    SoftLoadBalancing(coefficient=1.0),
    Importance(coefficient=1.0),
    Importance(coefficient=1.0, of="scores"),
    SmoothLoad(coefficient=1.0),
    DeviceBalance(coefficient=1.0, num_devices=3),
    CommunicationBalance(coefficient=1.0, num_devices=3, devices_per_token=2),
    MutualInformation(coefficient=1.0),
    MutualInformation(coefficient=1.0, given="modality", num_labels=2),
    LocalEntropy(coefficient=1.0),
    GlobalEntropy(coefficient=1.0),
    GlobalEntropy(coefficient=1.0, min_experts=6),
    StableBalance(coefficient=1.0),
    RouterLoss(coefficient=1.0, loss="own"),
    ZLoss(coefficient=1.0),
]
BATCH_LOSSES: list[BalanceLoss] = [
    *(loss.model_copy(update={"scope": "batch"}) for loss in SEQUENCE_LOSSES if "scope" in type(loss).model_fields),
    MutualInformation(coefficient=1.0, given="task", num_labels=2, scope="batch"),
]
LOSSES = SEQUENCE_LOSSES + BATCH_LOSSES


def context_of(batch_size: int, tokens: int, mask_T: Tensor | None = None) -> RoutingContext:
    """A context with labels: modalities take turns, sequences have different tasks."""
    return RoutingContext(
        batch_size=batch_size,
        mask_T=mask_T,
        modality_T=torch.arange(tokens) % 2,
        task_B=torch.arange(batch_size) % 2,
    )


def route(logits_TN: Tensor, top_k: int, function: Literal["softmax", "sigmoid"] = "softmax") -> Routing:
    """The record of a router with identity weights, and what records of some routers hold besides."""
    num_experts = logits_TN.shape[-1]
    router = TopKConfig(top_k=top_k, score_function=function).build(num_experts, num_experts).to(logits_TN.dtype)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    own_T = logits_TN.square().sum(-1)
    return replace(router(logits_TN), load_TN=logits_TN.sigmoid(), auxiliary={"own": own_T})


def record(index: list[list[int]], scores: list[list[float]]) -> Routing:
    """A record with given picks and scores."""
    scores_TN = torch.tensor(scores, dtype=torch.float64)
    index_TK = torch.tensor(index)
    weight_TK = torch.ones(index_TK.shape, dtype=torch.float64)
    return Routing(index_TK, weight_TK, scores_TN.log(), scores_TN, scores_TN)


def random_logits(tokens: int, num_experts: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(tokens + seed)
    return torch.randn(tokens, num_experts, dtype=torch.float64, generator=generator)


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


@pytest.mark.parametrize(
    "values",
    [
        {"type": "scheduled_top_k", "top_k": {"start": 2, "end": 8}},
        {"type": "threshold"},
        {"type": "dselect_k", "num_selectors": 2, "gamma": 0.1},
    ],
    ids=str,
)
def test_even_routing_gives_one_however_many_picks_tokens_have(values: dict) -> None:
    """Their records are wider than what a token runs: K T is the number of all picks."""
    torch.manual_seed(0)
    router: Any = TypeAdapter(RouterConfig).validate_python(values).build(16, 8).train()
    if values["type"] == "dselect_k":
        torch.nn.init.normal_(router.selector_weight)  # decided; a fresh one runs all experts
    routing = router(torch.randn(4000, 16))
    assert (routing.index_TK == 8).any()
    value = LoadBalancing(coefficient=1.0).per_sequence(routing, RoutingContext()).item()
    assert value == pytest.approx(1.0, abs=0.1)


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


# --- Other losses -----------------------------------------------------------------------------------------------------

# The worked example of DeepSeekMoE: picks {0, 1}, {1, 3}, {2, 0} with weights .4 .3, .5 .3, .45 .35.
SCORES = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.1, 0.3], [0.35, 0.15, 0.45, 0.05]]


def value(loss: BalanceLoss, routing: Routing | None = None, context: RoutingContext | None = None) -> float:
    """Of a single sequence."""
    if routing is None:
        routing = route(torch.tensor(SCORES, dtype=torch.float64).log(), 2)
    (only,) = loss.per_sequence(routing, context or RoutingContext()).tolist()
    return only


def test_first_choices_alone() -> None:
    """First picks 0, 1, 2: f = (4/3, 4/3, 4/3, 0), P as above: 4/3 * (1 - .15)."""
    assert value(LoadBalancing(coefficient=1.0, counts="first")) == pytest.approx(4 / 3 * 0.85)


def test_first_choice_of_equal_scores_is_the_lower_index_whatever_the_order_of_picks() -> None:
    loss, scores = LoadBalancing(coefficient=1.0, counts="first"), [[0.35, 0.25, 0.35, 0.05]]
    assert value(loss, record([[2, 0]], scores)) == pytest.approx(4 * 0.35)
    assert value(loss, record([[2, 1]], scores)) == pytest.approx(4 * 0.35)
    assert value(loss, record([[4, 1]], scores)) == pytest.approx(4 * 0.25)
    assert value(loss, record([[4, 4]], scores)) == 0


def test_first_and_all_are_the_same_with_one_pick() -> None:
    routing = route(random_logits(9), 1)
    assert value(LoadBalancing(coefficient=1.0, counts="first"), routing) == pytest.approx(
        value(LoadBalancing(coefficient=1.0), routing)
    )


def test_soft_counts_of_branch_train_mix() -> None:
    """u = (.75, .8, .45, .3) / 3, P = (.85, .95, .75, .45) / 3: 4 sum u P."""
    expected = 4 * (0.75 * 0.85 + 0.8 * 0.95 + 0.45 * 0.75 + 0.3 * 0.45) / 9
    assert value(SoftLoadBalancing(coefficient=1.0)) == pytest.approx(expected)
    uniform = record([[0, 1], [2, 3]], [[0.25] * 4] * 2)
    assert value(SoftLoadBalancing(coefficient=1.0), replace(uniform, weight_TK=uniform.weight_TK / 2)) == 1


def test_importance_of_shazeer() -> None:
    """Importance (.75, .8, .45, .3): mean .575, variance .043125 (arXiv 1701.06538, eq. 6-7)."""
    assert value(Importance(coefficient=1.0)) == pytest.approx(0.043125 / 0.575**2)
    mean = 3 / 4
    variance = ((0.85 - mean) ** 2 + (0.95 - mean) ** 2 + (0.75 - mean) ** 2 + (0.45 - mean) ** 2) / 4
    assert value(Importance(coefficient=1.0, of="scores")) == pytest.approx(variance / mean**2)
    collapsed = record([[1]] * 3, [[0.0, 1.0, 0.0, 0.0]] * 3)
    assert value(Importance(coefficient=1.0), collapsed) == pytest.approx(3)


def test_smooth_load() -> None:
    """Expected counts (1, 1.5, .5, 1): mean 1, variance .125 (arXiv 1701.06538, eq. 10-11)."""
    load_TN = torch.tensor([[1.0, 0.5, 0.5, 0.0], [0.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    routing = replace(record([[0, 1], [1, 3]], [[0.25] * 4] * 2), load_TN=load_TN)
    assert value(SmoothLoad(coefficient=1.0), routing) == pytest.approx(0.125)
    with pytest.raises(ConfigError, match="type = 'load' needs a router that knows the probability of each pick"):
        value(SmoothLoad(coefficient=1.0), replace(routing, load_TN=None))


def test_device_and_communication_balance() -> None:
    """DeepSeekMoE (arXiv 2401.06066, eq. 15-17) and DeepSeek-V2 (arXiv 2405.04434, section 2.2.3), devices {0, 1}, {2, 3}.

    f' = (4/3, 2/3), P' = (.6, .4), f'' = (1, 2/3).
    """
    communication = CommunicationBalance(coefficient=1.0, num_devices=2, devices_per_token=2)
    assert value(DeviceBalance(coefficient=1.0, num_devices=2)) == pytest.approx(16 / 15)
    assert value(communication) == pytest.approx(13 / 15)
    # The same with devices {0, 2} and {1, 3}: columns in another order.
    order = [0, 2, 1, 3]
    other = route(torch.tensor(SCORES, dtype=torch.float64).log()[:, order], 2)
    assert value(DeviceBalance(coefficient=1.0, num_devices=2), other) == pytest.approx(1.0)
    assert value(communication, other) == pytest.approx(2 / 3)
    assert value(DeviceBalance(coefficient=1.0, num_devices=1)) == pytest.approx(1.0)


def entropy(*p: float) -> float:
    return -sum(x * math.log(x) for x in p if x)


def test_mutual_information_of_tokens() -> None:
    given = sum(entropy(*row) for row in SCORES) / 3
    assert value(MutualInformation(coefficient=1.0)) == pytest.approx(given - entropy(0.85 / 3, 0.95 / 3, 0.25, 0.15))
    definite = record([[0], [1], [2], [3]], torch.eye(4).tolist())
    assert value(MutualInformation(coefficient=1.0), definite) == pytest.approx(-math.log(4))
    assert value(MutualInformation(coefficient=1.0), record([[0], [1]], [[0.7, 0.3]] * 2)) == pytest.approx(0)


def test_mutual_information_of_modalities_and_tasks() -> None:
    """p(e) = (.5, .5), given the label (.9, .1) or (.1, .9): H(.9, .1) - log 2, whatever the tokens are like inside."""
    scores = [[1.0, 0.0], [0.8, 0.2], [0.0, 1.0], [0.2, 0.8]]
    routing = record([[0], [0], [1], [1]], scores)
    expected = entropy(0.9, 0.1) - math.log(2)
    modality = RoutingContext(modality_T=torch.tensor([1, 1, 0, 0]))
    by_modality = MutualInformation(coefficient=1.0, given="modality", num_labels=3)
    assert value(by_modality, routing, modality) == pytest.approx(expected)
    by_task = MutualInformation(coefficient=1.0, given="task", num_labels=2, scope="batch")
    tasks = RoutingContext(batch_size=2, task_B=torch.tensor([0, 1]))
    assert by_task.per_sequence(routing, tasks).tolist() == pytest.approx([expected] * 2)
    same_task = RoutingContext(batch_size=2, task_B=torch.tensor([1, 1]))
    assert by_task.per_sequence(routing, same_task).tolist() == pytest.approx([0.0] * 2)


def test_entropies_of_limoe() -> None:
    scores = [[1.0, 0.0], [0.8, 0.2], [0.0, 1.0], [0.2, 0.8]]
    routing = record([[0], [0], [1], [1]], scores)
    context = RoutingContext(modality_T=torch.tensor([0, 0, 0, 1]))
    assert value(LocalEntropy(coefficient=1.0), routing) == pytest.approx(entropy(0.8, 0.2) / 2)
    assert value(LocalEntropy(coefficient=1.0, modality=0), routing, context) == pytest.approx(entropy(0.8, 0.2) / 3)
    assert value(GlobalEntropy(coefficient=1.0), routing) == pytest.approx(-math.log(2))
    of_one = GlobalEntropy(coefficient=1.0, modality=1)
    assert value(of_one, routing, context) == pytest.approx(-entropy(0.8, 0.2))
    assert value(GlobalEntropy(coefficient=1.0, modality=2), routing, context) == 0
    # Two experts in equal use are enough for a threshold of 1.5 and too few for one of 3.
    assert value(GlobalEntropy(coefficient=1.0, min_experts=1.5), routing) == 0
    assert value(GlobalEntropy(coefficient=1.0, min_experts=3), routing) == pytest.approx(math.log(3) - math.log(2))


def test_entropy_of_certain_choices_has_a_finite_gradient() -> None:
    scores_TN = torch.tensor([[1.0, 0.0]], requires_grad=True)
    routing = Routing(torch.tensor([[0]]), torch.ones(1, 1), scores_TN, scores_TN, scores_TN)
    for loss in (LocalEntropy(coefficient=1.0), GlobalEntropy(coefficient=1.0), MutualInformation(coefficient=1.0)):
        (gradient_TN,) = torch.autograd.grad(loss.per_sequence(routing, RoutingContext()).sum(), scores_TN)
        assert gradient_TN.isfinite().all()


def test_stable_balance() -> None:
    """Counts 3, 1 of two experts, n = 2: (.5 (s + s + s) - .5 s) / 4 with s = sigmoid(0) (arXiv 2204.08396)."""
    logits_TN = torch.zeros(4, 2, dtype=torch.float64)
    routing = replace(record([[0], [0], [0], [1]], [[0.5, 0.5]] * 4), logits_TN=logits_TN)
    assert value(StableBalance(coefficient=1.0), routing) == pytest.approx((0.5 * 1.5 - 0.5 * 0.5) / 4)
    balanced = replace(record([[0], [1]], [[0.5, 0.5]] * 2), logits_TN=logits_TN[:2])
    assert value(StableBalance(coefficient=1.0), balanced) == 0


def test_losses_of_the_router_are_averaged_over_tokens() -> None:
    loss = RouterLoss(coefficient=1.0, loss="own")
    routing = replace(record([[0]] * 4, [[0.5, 0.5]] * 4), auxiliary={"own": torch.tensor([1.0, 2.0, 3.0, 5.0])})
    context = RoutingContext(batch_size=2, mask_T=torch.tensor([True, True, True, False]))
    assert loss.per_sequence(routing, context).tolist() == [1.5, 3.0]
    assert loss.name == "own"


@pytest.mark.parametrize("label", ["modality", "task"])
def test_missing_labels_are_named(label: Any) -> None:
    loss = MutualInformation(coefficient=1.0, given=label, num_labels=2, scope="batch")
    message = f"{label} = None is needed by the balance loss mutual_information; call the model with `{label}_ids`"
    with pytest.raises(ConfigError, match=message):
        value(loss)


# --- Masks, for every loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_gradients_are_those_of_finite_differences(loss: BalanceLoss) -> None:
    """Picks are held, so that counts are constants."""
    logits_TN = random_logits(8)
    held = route(logits_TN, 2)

    def value_of(logits_TN: Tensor) -> Tensor:
        scores_TN = logits_TN.softmax(-1)
        routing = replace(
            held,
            weight_TK=scores_TN.gather(-1, held.index_TK),
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            load_TN=logits_TN.sigmoid(),
            auxiliary={"own": logits_TN.square().sum(-1)},
        )
        return loss.per_sequence(routing, context_of(2, 8))

    torch.testing.assert_close(value_of(logits_TN), loss.per_sequence(held, context_of(2, 8)))
    assert torch.autograd.gradcheck(value_of, logits_TN.requires_grad_())


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_masked_tokens_count_neither_in_value_nor_in_gradient(loss: BalanceLoss) -> None:
    # A seed with which no sequence is balanced by chance.
    logits_TN = random_logits(10, seed=0).requires_grad_()
    mask_T = torch.tensor([True, True, False, True, True, True, True, True, False, True])
    context = context_of(2, 10, mask_T)
    value_B = loss.per_sequence(route(logits_TN, 2), context)
    (gradient_TN,) = torch.autograd.grad(value_B.sum(), logits_TN)
    assert not gradient_TN[~mask_T].any()
    assert gradient_TN[mask_T].any(-1).all()
    changed_TN = torch.where(mask_T[:, None], logits_TN, -logits_TN)
    torch.testing.assert_close(loss.per_sequence(route(changed_TN, 2), context), value_B)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_full_mask_equals_no_mask(loss: BalanceLoss) -> None:
    routing = route(random_logits(8), 2)
    masked_B = loss.per_sequence(routing, context_of(2, 8, torch.ones(8, dtype=torch.bool)))
    torch.testing.assert_close(masked_B, loss.per_sequence(routing, context_of(2, 8)))


@pytest.mark.parametrize("loss", SEQUENCE_LOSSES, ids=repr)
def test_sequences_do_not_depend_on_each_other_nor_on_their_batch(loss: BalanceLoss) -> None:
    """So micro-batches, ranks and the order of sequences change nothing."""
    logits_TN = random_logits(12)
    together_B = loss.per_sequence(route(logits_TN, 2), context_of(3, 12))
    alone = [loss.per_sequence(route(part_TN, 2), context_of(1, 4)) for part_TN in logits_TN.split(4)]
    torch.testing.assert_close(torch.cat(alone), together_B)


@pytest.mark.parametrize("loss", BATCH_LOSSES, ids=repr)
def test_batch_scope_gives_every_sequence_the_value_of_all_tokens(loss: BalanceLoss) -> None:
    values_B = loss.per_sequence(route(random_logits(12), 2), context_of(3, 12))
    torch.testing.assert_close(values_B, values_B[:1].expand(3))


@pytest.mark.parametrize("loss", SEQUENCE_LOSSES, ids=repr)
def test_sequence_of_padding_gives_zero_and_the_other_is_untouched(loss: BalanceLoss) -> None:
    logits_TN = random_logits(8).requires_grad_()
    mask_T = torch.tensor([False] * 4 + [True] * 4)
    value_B = loss.per_sequence(route(logits_TN, 2), context_of(2, 8, mask_T))
    assert value_B[0] == 0
    torch.testing.assert_close(value_B[1:], loss.per_sequence(route(logits_TN[4:], 2), context_of(1, 4)))
    (gradient_TN,) = torch.autograd.grad(value_B.sum(), logits_TN)
    assert gradient_TN.isfinite().all()
    assert not gradient_TN[:4].any()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_nothing_but_padding_gives_zero(loss: BalanceLoss) -> None:
    routing = route(random_logits(8), 2, "sigmoid")
    context = context_of(2, 8, torch.zeros(8, dtype=torch.bool))
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
            r"balance\.0\.type = 'switch' .*choose one of 'load_balancing', .*'z_loss'",
        ),
        ({"coefficient": 1}, r"balance\.0\.type = None is required"),
        (
            {"type": "load_balancing", "coefficient": 1, "scope": "token"},
            r"balance\.0\.scope = 'token' is not one of the choices; choose one of 'sequence' or 'batch'",
        ),
        (
            {"type": "load", "coefficient": 1},
            r"balance\.0\.type = 'load' needs a router that knows the probability of each pick; use router noisy_top_k",
        ),
        (
            {"type": "device_balance", "coefficient": 1, "num_devices": 3},
            r"balance\.0\.num_devices = 3 does not divide num_experts \(4\); choose from \[1, 2, 4\]",
        ),
        (
            {"type": "communication_balance", "coefficient": 1, "num_devices": 2, "devices_per_token": 3},
            r"balance\.0\.devices_per_token = 3 is larger than num_devices \(2\); choose 1 to 2",
        ),
        (
            {"type": "mutual_information", "coefficient": 1, "given": "modality"},
            r"balance\.0\.num_labels = None is needed for given: modality",
        ),
        (
            {"type": "mutual_information", "coefficient": 1, "num_labels": 2},
            r"balance\.0\.num_labels = 2 does not go with given: token",
        ),
        (
            {"type": "mutual_information", "coefficient": 1, "given": "task", "num_labels": 2},
            r"balance\.0\.scope = 'sequence' holds one task only; set scope: batch",
        ),
        (
            {"type": "global_entropy", "coefficient": 1, "min_experts": 0.5},
            r"balance\.0\.min_experts = 0\.5 is not valid; .*greater than or equal to 1",
        ),
        (
            {"type": "router", "coefficient": 1, "loss": "diversity"},
            r"balance\.0\.loss = 'diversity' is no loss of router top_k; remove this entry",
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


def test_two_losses_of_one_type_need_labels() -> None:
    entry = {"type": "local_entropy", "coefficient": 0.1}
    with pytest.raises(ConfigError, match=r"^balance = .* names a loss twice; .* give each its own `label`"):
        MoESpec.from_dict({**BASE, "balance": [entry, {**entry, "modality": 1}]})
    spec = MoESpec.from_dict({**BASE, "balance": [entry, {**entry, "modality": 1, "label": "text_entropy"}]})
    assert [loss.name for loss in spec.balance] == ["local_entropy", "text_entropy"]


def test_the_load_loss_goes_with_noisy_top_k() -> None:
    router = {"type": "noisy_top_k", "top_k": 2}
    spec = MoESpec.from_dict({**BASE, "router": router, "balance": [{"type": "load", "coefficient": 0.1}]})
    assert isinstance(spec.balance[0], SmoothLoad)


def test_losses_of_the_router_go_with_a_router_that_has_them() -> None:
    values = {**BASE, "router": {"type": "threshold"}}
    spec = MoESpec.from_dict({**values, "balance": [{"type": "router", "loss": "diversity", "coefficient": 0.1}]})
    assert isinstance(spec.balance[0], RouterLoss)
    with pytest.raises(
        ConfigError, match=r"balance\.0\.loss = 'x' is no loss of router threshold; choose from diversity"
    ):
        MoESpec.from_dict({**values, "balance": [{"type": "router", "loss": "x", "coefficient": 0.1}]})
