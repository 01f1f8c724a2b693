"""The matrix that every router passes; its rows stand in router_rows.py.

Each test receives a router and builds everything else itself: sequences with token ids, positions, modalities, tasks
and, where it matters, padding. What a router's config says of itself is tested too: a router that claims to look at
nothing but earlier tokens must not move when later ones change, and one that does not claim it must move.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from tests.layer.router_rows import LENGTH, MODALITIES, ROUTERS, TASKS, VOCABULARY, B, D, N, Row
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.errors import ConfigError, UnsupportedOverride
from moesaic.layer import (
    BalanceLoss,
    BaseRouterConfig,
    Experts,
    ExpertsConfig,
    LayerLoad,
    LoadBalancing,
    MoEBlock,
    MoESpec,
    Router,
    RouterConfig,
    Routing,
    RoutingContext,
    ZLoss,
    routing_at,
)
from moesaic.layer.balance import BalanceObjective

LOSSES: list[BalanceLoss] = [LoadBalancing(coefficient=0.3), ZLoss(coefficient=0.2)]


@pytest.fixture(params=ROUTERS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROUTERS[request.param]


@pytest.fixture
def config(row: Row) -> BaseRouterConfig:
    return TypeAdapter(RouterConfig).validate_python(row.values)


def make_router(config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float64, training: bool = False) -> Router:
    """A router whose parameters and floating-point buffers all hold values that matter."""
    torch.manual_seed(seed)
    router = config.build(D, N).to(dtype).train(training)
    router.reset_parameters()
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*router.parameters(), *router.buffers()):
        if tensor.is_floating_point() and tensor.ndim:
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.7)
    return router


def make_input(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, LENGTH, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(dtype)


def make_context(batch_size: int = B, length: int = LENGTH, mask_BT: Tensor | None = None) -> RoutingContext:
    tokens = torch.arange(batch_size * length)
    return RoutingContext(
        batch_size=batch_size,
        token_ids_T=tokens * 7 % VOCABULARY,
        position_T=torch.arange(length).repeat(batch_size),
        mask_T=None if mask_BT is None else mask_BT.flatten(),
        modality_T=tokens * 3 % MODALITIES,
        task_B=torch.arange(batch_size) % TASKS,
        seed=torch.tensor(42),
    )


def rearrange(context: RoutingContext, rows_T: Tensor, sequences_B: Tensor) -> RoutingContext:
    """The context with other tokens in its place, sequences in the order given."""
    found = {name: getattr(context, name) for name in ("token_ids_T", "position_T", "mask_T", "modality_T")}
    taken: dict[str, Any] = {name: value[rows_T] for name, value in found.items() if value is not None}
    return replace(context, batch_size=len(sequences_B), task_B=context.task_B[sequences_B], **taken)  # type: ignore[index]


def route(router: Router, x_BTD: Tensor, context: RoutingContext | None = None) -> Routing:
    return router(x_BTD.reshape(-1, D), context or make_context(*x_BTD.shape[:2]))


def tensors(routing: Routing) -> dict[str, Tensor]:
    found = {field.name: getattr(routing, field.name) for field in fields(routing)}
    found |= {"choice_TK": routing.choice_TK, **{f"auxiliary {name}": loss for name, loss in routing.auxiliary.items()}}
    return {name: value.detach() for name, value in found.items() if isinstance(value, Tensor)}


def assert_same(actual: Routing, expected: Routing) -> None:
    assert torch.equal(actual.index_TK, expected.index_TK)
    torch.testing.assert_close(tensors(actual), tensors(expected), rtol=1e-12, atol=1e-12)


def run_experts(routing: Routing, x_BTD: Tensor) -> Tensor:
    """What fixed experts make of the input with this routing, y_TD."""
    torch.manual_seed(0)
    experts = Experts(ExpertsConfig(num_experts=N, intermediate_size=4), D).double()
    experts.reset_parameters(std=1.0)
    x_TD = x_BTD.reshape(-1, D)
    with torch.no_grad():
        if routing.assignment is not None:
            return routing.assignment.run(experts, x_TD)
        return experts(x_TD, routing.index_TK, routing.weight_TK)


def select_tokens(routing: Routing, keep_BT: Tensor, x_BTD: Tensor) -> dict[str, Tensor]:
    """The record and output of some tokens only, each token's picks in the order of experts."""
    everything = tensors(routing) | {"output": run_experts(routing, x_BTD)}
    chosen = {name: value[keep_BT.flatten()] for name, value in everything.items()}
    width = N  # routers whose K depends on the batch pad to the widest token
    order_TK = chosen["choice_TK"].argsort(dim=-1, stable=True)
    for name in ("index_TK", "weight_TK", "choice_TK", "chosen_TK", "dropped_TK"):
        if name in chosen:
            fill = {"index_TK": N, "choice_TK": routing.num_columns, "chosen_TK": routing.num_columns}.get(name, 0)
            chosen[name] = F.pad(chosen[name].gather(-1, order_TK), (0, max(width - order_TK.shape[1], 0)), value=fill)
    return chosen


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    try:
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    except AssertionError:
        return False
    return True


def gradients(router: torch.nn.Module, value: Tensor) -> dict[str, Tensor]:
    names = [name for name, parameter in router.named_parameters() if parameter.requires_grad]
    parameters = [router.get_parameter(name) for name in names]
    if not value.requires_grad:  # a router without parameters
        return {name: torch.zeros_like(parameter) for name, parameter in zip(names, parameters, strict=True)}
    return dict(zip(names, torch.autograd.grad(value, parameters, materialize_grads=True), strict=True))


both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


# --- Picks from outside --------------------------------------------------------------------------------------------------


@both_modes
def test_its_rule_weighs_its_own_picks_as_it_did(config: BaseRouterConfig, training: bool) -> None:
    router, x_BTD = make_router(config, training=training), make_input()
    routing = route(router, x_BTD)
    assert config.takes_picks == (routing.assignment is None)
    if not router.says_weights:
        with pytest.raises(UnsupportedOverride, match=f"router {config.type} .*weights"):
            router.weights_at(routing, routing.choice_TK)
        return
    shuffled_TK = torch.rand(routing.choice_TK.shape, generator=torch.Generator().manual_seed(1)).argsort(-1)
    choice_TK = F.pad(routing.choice_TK.gather(-1, shuffled_TK), (0, 1), value=routing.num_columns)
    again = routing_at(router, route(router, x_BTD), choice_TK)
    torch.testing.assert_close(run_experts(again, x_BTD), run_experts(routing, x_BTD), rtol=1e-12, atol=1e-12)
    for name in ("index_TK", "identity_weight_T"):
        expected, found = getattr(routing, name), getattr(again, name)
        if name == "index_TK":
            expected, found = expected.sort(-1).values, found.sort(-1).values[:, : routing.top_k]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    probe_TN = torch.randn(len(choice_TK), N + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = gradients(router, (routing.weight_TK * probe_TN.gather(-1, routing.index_TK)).sum())
    actual = gradients(router, (again.weight_TK * probe_TN.gather(-1, again.index_TK)).sum())
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


@both_modes
def test_tokens_without_picks_have_no_weight_and_no_nan_gradient(config: BaseRouterConfig, training: bool) -> None:
    router = make_router(config, training=training)
    if not router.says_weights:
        pytest.skip("weighs no picks")
    routing = route(router, make_input())
    choice_TK = routing.choice_TK.clone()
    choice_TK[::2] = routing.num_columns
    weight_TK = router.weights_at(routing, choice_TK)
    assert not weight_TK[::2].any()
    assert all(gradient.isfinite().all() for gradient in gradients(router, weight_TK.square().sum()).values())


# --- The record -------------------------------------------------------------------------------------------------------


@both_modes
def test_record_has_the_shapes_and_types_of_the_contract(config: BaseRouterConfig, training: bool) -> None:
    router = make_router(config, dtype=torch.float32, training=training)
    routing = route(router, make_input(torch.float32))
    tokens, columns = B * LENGTH, N + routing.num_null
    assert (router.num_experts, routing.num_experts, routing.num_columns) == (N, N, columns)
    assert routing.index_TK.shape == routing.weight_TK.shape == routing.choice_TK.shape
    assert routing.index_TK.shape[0] == tokens
    assert config.variable_width or routing.top_k == router.top_k
    assert routing.logits_TN.shape == routing.scores_TN.shape == routing.selection_TN.shape == (tokens, columns)
    assert routing.index_TK.dtype == torch.int64
    assert 0 <= int(routing.index_TK.min()) <= int(routing.index_TK.max()) <= N
    assert 0 <= int(routing.choice_TK.min()) <= int(routing.choice_TK.max()) <= columns
    assert config.may_skip or int(routing.index_TK.max()) < N
    assert config.has_smooth_load == (routing.load_TN is not None)
    assert config.has_selection_bias == (getattr(router, "e_score_correction_bias", None) is not None)
    for name in ("weight_TK", "logits_TN", "scores_TN", "selection_TN"):
        assert getattr(routing, name).dtype == torch.float32
    assert routing.weight_TK.isfinite().all()
    assert routing.scores_TN.min() >= 0  # balance losses normalise them
    assert not routing.selection_TN.requires_grad
    assert routing.auxiliary.keys() == config.provides
    for loss_T in routing.auxiliary.values():
        assert loss_T.shape == (tokens,)
        assert loss_T.isfinite().all()


def test_state_is_declared(config: BaseRouterConfig) -> None:
    routing = route(make_router(config), make_input())
    assert (routing.state is not None) == config.carries_state
    assert routing.state is None or routing.state.shape[0] == B * LENGTH


@both_modes
def test_no_expert_is_picked_twice_for_a_token(config: BaseRouterConfig, training: bool) -> None:
    routing = route(make_router(config, training=training), make_input())
    for picks_TK, none in ((routing.index_TK, N), (routing.choice_TK, routing.num_columns)):
        for picks in picks_TK.tolist():
            picked = [expert for expert in picks if expert != none]
            assert len(picked) == len(set(picked))


@both_modes
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(config: BaseRouterConfig, tokens: int, training: bool) -> None:
    router = make_router(config, training=training)
    routing = router(torch.ones(tokens, D, dtype=torch.float64), make_context(1, tokens))
    assert routing.index_TK.shape == (tokens, routing.top_k)
    for loss in LOSSES:
        assert loss.per_sequence(routing, make_context(1, tokens)).isfinite().all()


@both_modes
def test_routes_without_a_context_or_says_what_it_needs(config: BaseRouterConfig, training: bool) -> None:
    router = make_router(config, training=training)
    if not config.needs:
        assert router(make_input().reshape(-1, D)).weight_TK.isfinite().all()
        return
    with pytest.raises(ConfigError, match="|".join(config.needs)):
        router(make_input().reshape(-1, D))


@both_modes
def test_forward_is_pure(config: BaseRouterConfig, training: bool) -> None:
    router = make_router(config, training=training)
    before, generator = copy.deepcopy(router.state_dict()), torch.get_rng_state()
    context = make_context()
    first = route(router, make_input(), context)
    assert_same(route(router, make_input(), context), first)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not context.records  # committing is the block's work
    after = router.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@both_modes
def test_random_numbers_are_declared_and_come_from_the_seed(config: BaseRouterConfig, training: bool) -> None:
    router = make_router(config, training=training)
    records = [route(router, make_input(), replace(make_context(), seed=torch.tensor(seed))) for seed in range(8)]
    moved = any(not same(tensors(records[0]), tensors(other)) for other in records[1:])
    assert moved == ("random_numbers" in config.depends_on(training))


def test_state_of_a_step_is_committed_after_it(config: BaseRouterConfig) -> None:
    router = make_router(config, training=True)
    load = LayerLoad.of(route(router, make_input()))
    for progress in (0.0, 0.5, 1.0):
        router.post_step(load, progress)
    assert route(router, make_input()).weight_TK.isfinite().all()


# --- Gradients --------------------------------------------------------------------------------------------------------


def test_gradient_of_the_weights_reaches_the_gate(row: Row, config: BaseRouterConfig) -> None:
    router = make_router(config, training=True)
    routing = route(router, make_input())
    upstream_TK = torch.randn(routing.weight_TK.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = gradients(router, (routing.weight_TK * upstream_TK).sum())
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert {name for name, gradient in found.items() if not gradient.any()} == set(row.unreached)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_gradient_of_the_balance_loss_is_finite_and_reaches_the_gate(
    row: Row, config: BaseRouterConfig, loss: BalanceLoss
) -> None:
    router = make_router(config, training=True)
    value = loss.per_sequence(route(router, make_input()), make_context()).sum()
    found = gradients(router, value)
    assert all(gradient.isfinite().all() for gradient in found.values())
    if loss.name == "load_balancing" and found and not row.balanced:
        assert any(gradient.abs().max() > 1e-9 for gradient in found.values())


# --- What the routing of a token may depend on ------------------------------------------------------------------------


@both_modes
def test_other_sequences_matter_only_where_declared(config: BaseRouterConfig, training: bool) -> None:
    declared = config.depends_on(training)
    if "random_numbers" in declared:
        pytest.skip("draws random numbers by position in the batch")
    router = make_router(config, training=training)
    context, expected = make_context(), route(make_router(config, training=training), make_input())
    permutation_B = torch.tensor([2, 0, 3, 1])
    rows_T = torch.arange(B * LENGTH).view(B, LENGTH)[permutation_B].flatten()
    everything = torch.ones(B * LENGTH, dtype=torch.bool)
    permuted_BTD = make_input()[permutation_B]
    actual = route(router, permuted_BTD, rearrange(context, rows_T, permutation_B))
    moved = not same(
        {name: value[rows_T.argsort()] for name, value in select_tokens(actual, everything, permuted_BTD).items()},
        select_tokens(expected, everything, make_input()),
    )
    for first in range(B):
        changed_BTD = make_input()
        others_B = torch.arange(B) != first
        changed_BTD[others_B] = changed_BTD[others_B] * -3 + 1
        keep_BT = (~others_B).unsqueeze(-1).expand(B, LENGTH)
        changed = route(router, changed_BTD, context)
        moved |= not same(select_tokens(changed, keep_BT, changed_BTD), select_tokens(expected, keep_BT, make_input()))
    assert moved == ("other_sequences" in declared)


@both_modes
def test_later_tokens_matter_only_where_declared(config: BaseRouterConfig, training: bool) -> None:
    router = make_router(config, training=training)
    context = make_context()
    assert context.token_ids_T is not None
    moved = False
    for cut in range(1, LENGTH):
        changed_BTD = make_input()
        changed_BTD[:, cut:] = -3 * changed_BTD[:, cut:]
        earlier_BT = (torch.arange(LENGTH) < cut).expand(B, LENGTH)
        other_ids_T = torch.where(earlier_BT.flatten(), context.token_ids_T, VOCABULARY - 1 - context.token_ids_T)
        changed = route(router, changed_BTD, replace(context, token_ids_T=other_ids_T))
        expected = route(router, make_input(), context)
        moved |= not same(
            select_tokens(changed, earlier_BT, changed_BTD), select_tokens(expected, earlier_BT, make_input())
        )
    assert moved == ("later_tokens" in config.depends_on(training))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_padding_changes_neither_routing_nor_balance(config: BaseRouterConfig, loss: BalanceLoss, side: str) -> None:
    for training in (False, True):
        if "random_numbers" in config.depends_on(training):
            continue  # they are drawn by position in the batch, which padding changes
        router = make_router(config, training=training)
        padding = 3
        real_BT = torch.ones(B, LENGTH, dtype=torch.bool)
        empty_BT = torch.zeros(B, padding, dtype=torch.bool)
        filler_BTD = 5 * torch.ones(B, padding, D, dtype=torch.float64)
        order = -1 if side == "left" else 1
        mask_BT = torch.cat([real_BT, empty_BT][::order], dim=1)
        x_BTD = torch.cat([make_input(), filler_BTD][::order], dim=1)
        context, plain = make_context(length=LENGTH + padding, mask_BT=mask_BT), make_context()
        for name in ("token_ids_T", "position_T", "modality_T"):
            getattr(context, name)[mask_BT.flatten()] = getattr(plain, name)
        padded, expected = route(router, x_BTD, context), route(router, make_input(), plain)
        everything = torch.ones(B * LENGTH, dtype=torch.bool)
        assert same(select_tokens(padded, mask_BT, x_BTD), select_tokens(expected, everything, make_input()))
        torch.testing.assert_close(loss.per_sequence(padded, context), loss.per_sequence(expected, plain))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_balance_does_not_depend_on_the_split_into_micro_batches(
    config: BaseRouterConfig, loss: BalanceLoss, sizes: Sequence[int]
) -> None:
    """Each sequence weighs its share of all real tokens, as in the language-model loss."""
    training = "random_numbers" not in config.depends_on(True) and "other_sequences" not in config.depends_on(True)
    if "other_sequences" in config.depends_on(training):
        pytest.skip("the routing itself depends on the other sequences")
    router = make_router(config, training=training)
    lengths_B1 = torch.tensor([[5], [2], [4], [1]])
    mask_BT = torch.arange(LENGTH) < lengths_B1
    weight_B = lengths_B1.flatten() / lengths_B1.sum()

    def weighted(start: int, end: int) -> Tensor:
        rows_T = torch.arange(start * LENGTH, end * LENGTH)
        context = rearrange(make_context(mask_BT=mask_BT), rows_T, torch.arange(start, end))
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
def test_bfloat16_input_is_routed_in_float32(config: BaseRouterConfig, autocast: bool) -> None:
    router = make_router(config, dtype=torch.float32).bfloat16()
    x_BTD = make_input(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing = route(router, x_BTD)
    exact = route(copy.deepcopy(router).double(), x_BTD.double())
    assert routing.weight_TK.dtype == torch.float32
    torch.testing.assert_close(routing.logits_TN.double(), exact.logits_TN.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routing.scores_TN.double(), exact.scores_TN.double(), rtol=1e-5, atol=1e-5)
    assert not routing.weight_TK.requires_grad or gradients(router, routing.weight_TK.square().sum())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_neither_record_nor_gradients(config: BaseRouterConfig, use_reentrant: bool) -> None:
    """Two layers, so that a state handed from one to the next is part of it."""
    spec = MoESpec.model_validate({"experts": {"num_experts": N, "intermediate_size": 4}, "router": config})

    def run(checkpointed: bool) -> tuple[list[Routing], Tensor, dict[str, Tensor | None]]:
        torch.manual_seed(0)
        blocks = torch.nn.ModuleList([MoEBlock(spec, D, layer).double() for layer in range(2)])
        for seed, block in enumerate(blocks):
            block.gate.load_state_dict(make_router(config, seed=seed).state_dict())
        blocks[1].gate.share(blocks[0].gate)
        x_BTD, context = make_input().requires_grad_(), make_context()
        y_BTD = x_BTD
        for block in blocks:
            change_BTD = (
                checkpoint(block, y_BTD, context, use_reentrant=use_reentrant)
                if checkpointed
                else block(y_BTD, context)
            )
            y_BTD = y_BTD + change_BTD  # type: ignore[operator]
        objective = BalanceObjective(LOSSES, torch.full((B,), 1 / B, dtype=torch.float64))
        total = objective.add_to(y_BTD.square().sum(), objective.by_name(context), context)
        (3 * total).backward()
        found = {name: parameter.grad for name, parameter in blocks.named_parameters()}
        return list(context.records.values()), total.detach(), {**found, "input": x_BTD.grad}

    expected_routing, expected_loss, expected = run(checkpointed=False)
    routing, loss, found = run(checkpointed=True)
    for actual_record, expected_record in zip(routing, expected_routing, strict=True):
        assert_same(actual_record, expected_record)
    assert loss == expected_loss
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_state_dict_round_trip(config: BaseRouterConfig) -> None:
    router, other = make_router(config, seed=0), make_router(config, seed=1)
    expected = route(router, make_input())
    # Tables of integers follow from the config, and are the same whatever the seed.
    if any(tensor.is_floating_point() and tensor.ndim for tensor in router.state_dict().values()):
        assert not same(tensors(route(other, make_input())), tensors(expected))
    other.load_state_dict(router.state_dict())
    assert_same(route(other, make_input()), expected)


def test_copy_is_independent(config: BaseRouterConfig) -> None:
    router = make_router(config)
    expected = route(router, make_input())
    clone = copy.deepcopy(router)
    assert_same(route(clone, make_input()), expected)
    for parameter in clone.parameters():
        parameter.data.zero_()
    assert_same(route(router, make_input()), expected)


def test_casts_leave_full_precision_buffers_alone(config: BaseRouterConfig) -> None:
    router = make_router(config, dtype=torch.float32)
    kept = {name: getattr(router, name).clone() for name in router.full_precision if getattr(router, name) is not None}
    router.bfloat16().float()
    assert all(torch.equal(getattr(router, name), tensor) for name, tensor in kept.items())


def test_compiles_to_one_graph(config: BaseRouterConfig) -> None:
    if config.variable_width:
        pytest.skip("the width of its record depends on the data")
    router = make_router(config)
    torch._dynamo.reset()  # the rows share one forward, and each of its versions counts as a recompilation
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    assert_same(compiled(make_input().view(-1, D), make_context()), route(router, make_input()))


# --- The config -------------------------------------------------------------------------------------------------------


def test_config_round_trips_through_plain_values(config: BaseRouterConfig) -> None:
    assert TypeAdapter(RouterConfig).validate_python(config.to_dict()) == config


def test_unservable_follows_from_what_evaluation_depends_on(config: BaseRouterConfig) -> None:
    if config.depends_on(training=False):
        assert config.unservable


def test_sizes_of_the_test_input_are_those_of_the_rows() -> None:
    context = make_context()
    assert int(context.token_ids_T.max()) < VOCABULARY  # type: ignore[union-attr]
    assert int(context.modality_T.max()) < MODALITIES  # type: ignore[union-attr]
    assert int(context.task_B.max()) < TASKS  # type: ignore[union-attr]
