"""The matrix that every router passes. To enter a router: one row in ROUTERS.

Each test receives a router config and builds everything else itself: sequences with token ids, positions and, where
it matters, padding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.layer import (
    BalanceLoss,
    LoadBalancing,
    MoEBlock,
    MoESpec,
    Router,
    RouterConfig,
    Routing,
    RoutingContext,
    ZLoss,
)
from moesaic.layer.balance import BalanceObjective

ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {"type": "top_k", "top_k": 3},
    "softmax_renormalised": {"type": "top_k", "top_k": 3, "normalize_top_k": True},
    "softmax_over_selected": {"type": "top_k", "top_k": 3, "softmax_over": "selected", "linear_bias": True},
    "top_1": {"type": "top_k", "top_k": 1},
    "all_experts": {"type": "top_k", "top_k": 8},
    "device_ties": {"type": "top_k", "top_k": 3, "stable_ties": False},
    "deepseek_v2": {"type": "top_k", "top_k": 3, "num_groups": 4, "top_k_groups": 2, "scaling_factor": 16.0},
    "deepseek_v3": {
        "type": "top_k",
        "top_k": 3,
        "score_function": "sigmoid",
        "selection_bias": True,
        "normalize_top_k": True,
        "normalization_epsilon": 1e-20,
        "scaling_factor": 2.5,
        "num_groups": 4,
        "top_k_groups": 2,
        "group_score": "top2_sum",
    },
    "zero_mask": {
        "type": "top_k",
        "top_k": 3,
        "selection_bias": True,
        "num_groups": 4,
        "top_k_groups": 2,
        "group_mask_value": "zero",
    },
    "sqrt_softplus": {"type": "top_k", "top_k": 3, "score_function": "sqrt_softplus", "selection_bias": True},
}

LOSSES: list[BalanceLoss] = [LoadBalancing(coefficient=0.3), ZLoss(coefficient=0.2)]
N, D, B, LENGTH, VOCABULARY = 8, 6, 4, 5, 11


@pytest.fixture(params=ROUTERS)
def config(request: pytest.FixtureRequest) -> Any:
    return TypeAdapter(RouterConfig).validate_python(ROUTERS[request.param])


def make_router(config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Router:
    """A router whose parameters and buffers all hold values that matter."""
    router = config.build(D, N).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.7)
    return router


def make_input(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, LENGTH, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)


def make_context(batch_size: int = B, length: int = LENGTH, mask_BT: Tensor | None = None) -> RoutingContext:
    ids = torch.arange(batch_size * length) * 7 % VOCABULARY
    positions = torch.arange(length).repeat(batch_size)
    mask_T = None if mask_BT is None else mask_BT.flatten()
    return RoutingContext(batch_size=batch_size, token_ids_T=ids, position_T=positions, mask_T=mask_T)


def route(router: Router, x_BTD: Tensor, context: RoutingContext | None = None) -> Routing:
    return router(x_BTD.reshape(-1, D), context or make_context(*x_BTD.shape[:2]))


def tensors(routing: Routing) -> dict[str, Tensor]:
    found = {field.name: getattr(routing, field.name) for field in fields(routing)}
    return {name: value.detach() for name, value in found.items() if value is not None}


def assert_same(actual: Routing, expected: Routing) -> None:
    assert torch.equal(actual.index_TK, expected.index_TK)
    torch.testing.assert_close(tensors(actual), tensors(expected), rtol=1e-12, atol=1e-12)


def select_tokens(routing: Routing, keep_BT: Tensor) -> Routing:
    """The record of some tokens only."""
    keep_T = keep_BT.flatten()
    return replace(routing, **{name: value[keep_T] for name, value in tensors(routing).items()})


def gradients(router: torch.nn.Module, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*router.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters, materialize_grads=True), strict=True))


# --- The record -------------------------------------------------------------------------------------------------------


def test_record_has_the_shapes_and_types_of_the_contract(config: Any) -> None:
    router = make_router(config, dtype=torch.float32)
    routing = route(router, make_input(torch.float32))
    tokens = B * LENGTH
    assert (router.num_experts, routing.num_experts) == (N, N)
    assert router.top_k == routing.top_k
    assert routing.index_TK.shape == routing.weight_TK.shape == (tokens, router.top_k)
    assert routing.logits_TN.shape == routing.scores_TN.shape == routing.selection_TN.shape == (tokens, N)
    assert routing.index_TK.dtype == torch.int64
    assert 0 <= int(routing.index_TK.min()) <= int(routing.index_TK.max()) <= N
    for name in ("weight_TK", "logits_TN", "scores_TN", "selection_TN"):
        assert getattr(routing, name).dtype == torch.float32
    assert routing.weight_TK.isfinite().all()
    assert routing.scores_TN.min() >= 0  # balance losses normalise them
    assert not routing.selection_TN.requires_grad


def test_no_expert_is_picked_twice_for_a_token(config: Any) -> None:
    for row in route(make_router(config), make_input()).index_TK.tolist():
        picked = [expert for expert in row if expert != N]
        assert len(picked) == len(set(picked))


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(config: Any, tokens: int) -> None:
    routing = make_router(config)(torch.ones(tokens, D, dtype=torch.float64), make_context(1, tokens))
    assert routing.index_TK.shape == (tokens, routing.top_k)
    for loss in LOSSES:
        assert loss.per_sequence(routing, make_context(1, tokens)).isfinite().all()


def test_routes_without_a_context(config: Any) -> None:
    assert make_router(config)(make_input().reshape(-1, D)).weight_TK.isfinite().all()


def test_forward_is_pure(config: Any) -> None:
    router = make_router(config).train()
    before = copy.deepcopy(router.state_dict())
    context = make_context()
    first = route(router, make_input(), context)
    assert_same(route(router, make_input(), context), first)
    assert not context.records  # committing is the block's work
    after = router.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- Gradients --------------------------------------------------------------------------------------------------------


def test_gradient_of_the_weights_reaches_the_gate(config: Any) -> None:
    router = make_router(config)
    routing = route(router, make_input())
    upstream_TK = torch.randn(routing.weight_TK.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = gradients(router, (routing.weight_TK * upstream_TK).sum())
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_gradient_of_the_balance_loss_reaches_the_gate(config: Any, loss: BalanceLoss) -> None:
    router = make_router(config)
    found = gradients(router, loss.per_sequence(route(router, make_input()), make_context()).sum())
    assert all(gradient.isfinite().all() for gradient in found.values())
    # With every expert picked by every token the counts are equal, and the load is balanced whatever the scores are.
    flat = loss.name == "load_balancing" and config.top_k == N
    assert flat or all(gradient.abs().max() > 1e-9 for gradient in found.values())


# --- What the routing of a token may depend on ------------------------------------------------------------------------


def test_order_of_sequences_in_the_batch_does_not_matter(config: Any) -> None:
    router = make_router(config)
    permutation_B = torch.tensor([2, 0, 3, 1])
    rows_T = torch.arange(B * LENGTH).view(B, LENGTH)[permutation_B].flatten()
    context = make_context()
    assert context.token_ids_T is not None
    expected = tensors(route(router, make_input(), context))
    permuted = replace(context, token_ids_T=context.token_ids_T[rows_T])
    actual = route(router, make_input()[permutation_B], permuted)
    assert torch.equal(actual.index_TK, expected["index_TK"][rows_T])
    torch.testing.assert_close(
        tensors(actual), {name: value[rows_T] for name, value in expected.items()}, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("cut", range(1, LENGTH))
def test_routing_does_not_depend_on_later_tokens(config: Any, cut: int) -> None:
    router = make_router(config)
    changed_BTD = make_input()
    changed_BTD[:, cut:] = -3 * changed_BTD[:, cut:]
    context = make_context()
    assert context.token_ids_T is not None
    earlier_BT = (torch.arange(LENGTH) < cut).expand(B, LENGTH)
    other_ids_T = torch.where(earlier_BT.flatten(), context.token_ids_T, VOCABULARY - 1 - context.token_ids_T)
    changed = route(router, changed_BTD, replace(context, token_ids_T=other_ids_T))
    expected = route(router, make_input(), context)
    assert_same(select_tokens(changed, earlier_BT), select_tokens(expected, earlier_BT))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_padding_changes_neither_routing_nor_balance(config: Any, loss: BalanceLoss, side: str) -> None:
    router = make_router(config)
    padding = 3
    real_BT = torch.ones(B, LENGTH, dtype=torch.bool)
    empty_BT = torch.zeros(B, padding, dtype=torch.bool)
    filler_BTD = 5 * torch.ones(B, padding, D, dtype=torch.float64)
    order = -1 if side == "left" else 1
    mask_BT = torch.cat([real_BT, empty_BT][::order], dim=1)
    x_BTD = torch.cat([make_input(), filler_BTD][::order], dim=1)
    context, plain = make_context(length=LENGTH + padding, mask_BT=mask_BT), make_context()
    assert context.token_ids_T is not None
    assert context.position_T is not None
    context.token_ids_T[mask_BT.flatten()] = plain.token_ids_T  # type: ignore[assignment]
    context.position_T[mask_BT.flatten()] = plain.position_T  # type: ignore[assignment]
    padded, expected = route(router, x_BTD, context), route(router, make_input(), plain)
    assert_same(select_tokens(padded, mask_BT), expected)
    torch.testing.assert_close(loss.per_sequence(padded, context), loss.per_sequence(expected, plain))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_balance_does_not_depend_on_the_split_into_micro_batches(
    config: Any, loss: BalanceLoss, sizes: Sequence[int]
) -> None:
    """Each sequence weighs its share of all real tokens, as in the language-model loss."""
    router = make_router(config)
    lengths_B1 = torch.tensor([[5], [2], [4], [1]])
    mask_BT = torch.arange(LENGTH) < lengths_B1
    weight_B = lengths_B1.flatten() / lengths_B1.sum()
    ids_BT = make_context().token_ids_T.view(B, LENGTH)  # type: ignore[union-attr]

    def weighted(start: int, end: int) -> Tensor:
        context = make_context(end - start, mask_BT=mask_BT[start:end])
        context.token_ids_T = ids_BT[start:end].flatten()
        routing = route(router, make_input()[start:end], context)
        return (loss.per_sequence(routing, context) * weight_B[start:end]).sum()

    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    micro = [weighted(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    whole = weighted(0, B)
    torch.testing.assert_close(sum(micro), whole)
    micro_gradients = gradients(router, torch.stack(micro).sum())
    torch.testing.assert_close(micro_gradients, gradients(router, whole), rtol=1e-10, atol=1e-12)


# --- How it is run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_input_is_routed_in_float32(config: Any, autocast: bool) -> None:
    router = make_router(config, dtype=torch.float32).bfloat16()
    x_BTD = make_input(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing = route(router, x_BTD)
    exact = route(copy.deepcopy(router).double(), x_BTD.double())
    assert routing.weight_TK.dtype == torch.float32
    torch.testing.assert_close(routing.logits_TN.double(), exact.logits_TN, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routing.scores_TN.double(), exact.scores_TN, rtol=1e-5, atol=1e-5)
    assert gradients(router, routing.weight_TK.square().sum())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_neither_record_nor_gradients(config: Any, use_reentrant: bool) -> None:
    spec = MoESpec.model_validate({"experts": {"num_experts": N, "intermediate_size": 4}, "router": config})

    def run(checkpointed: bool) -> tuple[Routing, Tensor, dict[str, Tensor | None]]:
        torch.manual_seed(0)
        block = MoEBlock(spec, D).double()
        block.gate.load_state_dict(make_router(config).state_dict())
        x_BTD, context = make_input().requires_grad_(), make_context()
        y_BTD = (
            checkpoint(block, x_BTD, context, use_reentrant=use_reentrant) if checkpointed else block(x_BTD, context)
        )
        objective = BalanceObjective(LOSSES, torch.full((B,), 1 / B, dtype=torch.float64))
        total = objective.add_to(y_BTD.square().sum(), objective.by_name(context), context)  # type: ignore[union-attr]
        (3 * total).backward()
        found = {name: parameter.grad for name, parameter in block.named_parameters()}
        return context.records[0], total.detach(), {**found, "input": x_BTD.grad}

    expected_routing, expected_loss, expected = run(checkpointed=False)
    routing, loss, found = run(checkpointed=True)
    assert_same(routing, expected_routing)
    assert loss == expected_loss
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_state_dict_round_trip(config: Any) -> None:
    router, other = make_router(config, seed=0), make_router(config, seed=1)
    expected = route(router, make_input())
    assert not torch.equal(route(other, make_input()).logits_TN, expected.logits_TN)
    other.load_state_dict(router.state_dict())
    assert_same(route(other, make_input()), expected)


def test_copy_is_independent(config: Any) -> None:
    router = make_router(config)
    expected = route(router, make_input())
    clone = copy.deepcopy(router)
    assert_same(route(clone, make_input()), expected)
    for parameter in clone.parameters():
        parameter.data.zero_()
    assert_same(route(router, make_input()), expected)


def test_compiles_to_one_graph(config: Any) -> None:
    router = make_router(config)
    torch._dynamo.reset()  # the rows share one forward, and each of its versions counts as a recompilation
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    assert_same(compiled(make_input().view(-1, D), make_context()), route(router, make_input()))


def test_config_round_trips_through_plain_values(config: Any) -> None:
    assert TypeAdapter(RouterConfig).validate_python(config.to_dict()) == config
