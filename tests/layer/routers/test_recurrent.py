"""Recurrent routers: RMoE's worked numbers, torch's own cells, parameter counts, where gradients go, checkpointing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.errors import ConfigError
from moesaic.layer import (
    CosineConfig,
    LoadBalancing,
    MoEBlock,
    MoESpec,
    RecurrentConfig,
    RecurrentRouter,
    Routing,
    RoutingContext,
)
from moesaic.layer.balance import BalanceObjective
from moesaic.layer.routers.parts.cells import Cell, CellName

N, D, P, T = 4, 6, 5, 7
CELLS: tuple[CellName, ...] = ("gru", "rnn", "lstm")


def make_routers(count: int = 3, seed: int = 0, **fields: Any) -> nn.ModuleList:
    """Routers of successive layers with a shared cell, in float64, all parameters random."""
    config = RecurrentConfig.from_dict({"top_k": 2, "state_size": P, **fields})
    torch.manual_seed(seed)
    routers = nn.ModuleList([config.build(D, N).double() for _ in range(count)])
    for layer, router in enumerate(routers):
        router.layer = layer  # type: ignore[assignment]
        if layer:
            router.share(routers[0])  # type: ignore[operator]
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.normal_(std=0.7)
    return routers


def make_inputs(count: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(T, D, dtype=torch.float64, generator=generator) for _ in range(count)]


def run(routers: nn.ModuleList, inputs: Sequence[Tensor]) -> list[Routing]:
    """One pass up the layers, whose inputs are given."""
    context = RoutingContext()
    for router, x_TD in zip(routers, inputs, strict=True):
        context.commit(router.layer, router(x_TD, context))  # type: ignore[arg-type]
    return list(context.records.values())


# --- Worked numbers ---------------------------------------------------------------------------------------------------


def worked_routers(mode: str) -> nn.ModuleList:
    routers = make_routers(2, state_size=2, mode=mode, linear_bias=False)
    projector = torch.zeros(2, D)
    projector[:, :2] = torch.eye(2)
    cell = routers[0].cell
    with torch.no_grad():
        for router in routers:
            router.projector.weight.copy_(projector)  # type: ignore[union-attr]
            router.weight.copy_(torch.tensor([[1, 0], [0, 1], [1, 1], [-1, 0]]))  # type: ignore[operator]
        diagonal = torch.eye(2)
        cell.weight_ih.copy_(torch.cat([0.5 * diagonal, 0.25 * diagonal, diagonal]))  # type: ignore[union-attr]
        cell.weight_hh.copy_(torch.cat([0.2 * diagonal, 0.4 * diagonal, 0.5 * diagonal]))  # type: ignore[union-attr]
        cell.bias_ih.zero_()  # type: ignore[union-attr]
        cell.bias_hh.copy_(torch.tensor([0, 0, 0, 0, 0.1, 0.1]))  # type: ignore[union-attr]
    return routers


def worked_inputs() -> list[Tensor]:
    inputs = [torch.zeros(1, D, dtype=torch.float64) for _ in range(2)]
    inputs[0][0, :2] = torch.tensor([1.0, -1.0])
    inputs[1][0, :2] = torch.tensor([0.5, 2.0])
    return inputs


def close(actual: Tensor, expected: Sequence[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-6)


def test_two_layers_by_hand() -> None:
    """Equations 2 to 4 of arXiv 2408.06793; the reset gate scales the projected state with its bias."""
    first, second = run(worked_routers("full"), worked_inputs())
    assert first.state is not None
    assert second.state is not None
    close(first.state, [0.344358, -0.418977])
    close(first.logits_TN, [0.344358, -0.418977, -0.074619, -0.344358])
    close(first.scores_TN, [0.380800, 0.177495, 0.250460, 0.191246])
    assert first.index_TK.tolist() == [[0, 2]]
    close(first.weight_TK, [0.603238, 0.396762])
    close(second.state, [0.445384, 0.156151])
    close(second.scores_TN, [0.300464, 0.224999, 0.351244, 0.123293])
    assert second.index_TK.tolist() == [[2, 0]]
    close(second.weight_TK, [0.538959, 0.461041])


def test_two_layers_by_hand_without_passing() -> None:
    first, second = run(worked_routers("no_passing"), worked_inputs())
    assert first.state is None
    assert second.index_TK.tolist() == [[2, 1]]
    close(second.logits_TN[:, :2], [0.236817, 0.365778])
    close(second.weight_TK, [0.558929, 0.441071])


def test_closed_and_open_gates() -> None:
    """An update gate at 0 forgets the state, at 1 keeps the start, zero, in every layer."""
    routers = make_routers(3, state_size=N)
    cell: Any = routers[0].cell
    with torch.no_grad():
        for router in routers:
            router.weight.copy_(torch.eye(N))  # type: ignore[operator]
        cell.weight_ih.zero_()
        cell.weight_ih[2 * N :] = torch.eye(N)
        cell.bias_hh.zero_()
        cell.bias_ih[: 2 * N] = -50.0
    inputs = make_inputs()
    for router, x_TD, routing in zip(routers, inputs, run(routers, inputs), strict=True):
        new_TP = torch.tanh(router.projector(x_TD) + cell.bias_ih[2 * N :])  # type: ignore[operator]
        torch.testing.assert_close(routing.logits_TN, new_TP + router.bias)
    with torch.no_grad():
        cell.bias_ih[N : 2 * N] = 50.0
    for router, routing in zip(routers, run(routers, inputs), strict=True):
        torch.testing.assert_close(routing.logits_TN, router.bias.expand(T, -1))  # type: ignore[operator]


# --- torch's own cells ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_equal_those_of_torch(kind: CellName, dtype: torch.dtype, tolerance: float) -> None:
    """Parameters go over by name; initial values have torch's bound, and the state starts at zero."""
    torch.manual_seed(0)
    theirs = {"gru": nn.GRUCell, "rnn": nn.RNNCell, "lstm": nn.LSTMCell}[kind](P, P).to(dtype)
    ours = Cell(kind, P)
    ours.reset_parameters()
    assert all(0.3 < parameter.abs().max() * P**0.5 <= 1 for parameter in ours.parameters())
    ours.to(dtype).load_state_dict(theirs.state_dict())
    u_TP = torch.randn(T, P, dtype=dtype, requires_grad=True)
    for state_TW in (ours.start_state(u_TP), torch.randn(T, ours.width, dtype=dtype)):
        given = state_TW.chunk(2, dim=-1) if kind == "lstm" else state_TW
        expected = theirs(u_TP, given)
        expected = torch.cat(expected, dim=-1) if kind == "lstm" else expected
        actual = ours(u_TP, state_TW)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
        upstream = torch.randn_like(actual)
        gradients = [
            torch.autograd.grad(result, [u_TP, *cell.parameters()], upstream)
            for cell, result in ((ours, actual), (theirs, expected))
        ]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("kind", CELLS)
def test_gradients_of_a_cell_are_those_of_finite_differences(kind: CellName) -> None:
    torch.manual_seed(0)
    cell = Cell(kind, 3).double()
    cell.reset_parameters(std=0.7)
    inputs = [torch.randn(2, width, dtype=torch.float64, requires_grad=True) for width in (3, cell.width)]
    assert torch.autograd.gradcheck(cell, inputs)


# --- A slow reference -------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(CELLS),
    st.sampled_from(["full", "detached", "no_passing", "learned_start"]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=60)
def test_layers_equal_a_reference_that_goes_token_by_token(
    kind: CellName, mode: str, residual: float, accumulate: bool, shared_projector: bool, seed: int
) -> None:
    """Cells are torch's; state, start and residual logits are plain variables of a loop."""
    routers: Any = make_routers(
        seed=seed,
        cell=kind,
        mode=mode,
        residual=residual,
        accumulate_residual=accumulate and residual > 0,
        shared_projector=shared_projector,
    )
    inputs = make_inputs(seed=seed)
    records = run(routers, inputs)
    owned = {name: tensor for name, tensor in routers[0].cell.named_parameters() if name != "start"}
    cell = {"gru": nn.GRUCell, "rnn": nn.RNNCell, "lstm": nn.LSTMCell}[kind](P, P).double()
    cell.load_state_dict(owned)
    start_W = routers[0].cell.start
    start_W = torch.zeros(routers[0].cell.width, dtype=torch.float64) if start_W is None else start_W
    for token in range(T):
        state_W, carried_N = start_W, None
        for router, x_TD, routing in zip(routers, inputs, records, strict=True):
            projector = routers[0].projector if shared_projector else router.projector
            u_P = projector.weight @ x_TD[token] + projector.bias
            if mode in ("no_passing", "learned_start"):
                state_W = start_W
            result = cell(u_P, state_W.chunk(2) if kind == "lstm" else state_W)
            state_W = torch.cat(result) if kind == "lstm" else result
            own_N = router.weight @ state_W[:P] + router.bias
            logits_N = own_N if carried_N is None else own_N + residual * carried_N
            carried_N = logits_N if accumulate else own_N
            torch.testing.assert_close(routing.logits_TN[token], logits_N, rtol=1e-10, atol=1e-10)
            best = logits_N.argsort(descending=True, stable=True)[:2].tolist()
            assert routing.index_TK[token].tolist() == best
            torch.testing.assert_close(routing.weight_TK[token], logits_N[best].softmax(-1))


@pytest.mark.parametrize("mode", ["full", "no_passing"])
def test_a_cosine_head_is_a_cosine_router_on_the_state(mode: str) -> None:
    """XMoE + GRU (table 2): the state of layer i takes the place of the token."""
    routers: Any = make_routers(head="cosine", head_size=3, mode=mode)
    inputs = make_inputs()
    for router, routing in zip(routers, run(routers, inputs), strict=True):
        theirs = CosineConfig(top_k=2, projection_size=3, normalize_top_k=True).build(P, N).double()
        own = dict(router.named_parameters(recurse=False))
        theirs.load_state_dict(own)
        state_TP = routing.state
        if state_TP is None:
            u_TP = router.projector(inputs[router.layer])
            state_TP = router.cell(u_TP, router.cell.start_state(u_TP))
        expected = theirs(state_TP)
        torch.testing.assert_close(routing.logits_TN, expected.logits_TN)
        torch.testing.assert_close(routing.weight_TK, expected.weight_TK)
        assert torch.equal(routing.index_TK, expected.index_TK)


def test_a_cosine_head_starts_as_a_cosine_router_does() -> None:
    router = RecurrentConfig(top_k=2, head="cosine").build(40, N)
    assert router.weight.shape == (N, 16)
    assert router.projection_weight is not None
    assert router.projection_weight.shape == (16, 128)
    assert router.log_scale is not None
    assert router.log_scale.exp().item() == pytest.approx(1 / 0.3)
    assert router.bias is None


def test_the_state_stays_within_1() -> None:
    routers = make_routers(8)
    for routing in run(routers, [100 * x_TD for x_TD in make_inputs(8)]):
        assert routing.state is not None
        assert routing.state.abs().max() <= 1


# --- Parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "hidden_size", "linear_bias", "count"),
    [(6, 264, True, 314_976), (8, 352, True, 477_056), (24, 1280, False, 4_080_384)],
)
def test_parameter_counts_of_the_paper(layers: int, hidden_size: int, linear_bias: bool, count: int) -> None:
    """Tables 1 and 3: 0.29M and 0.43M more than linear routers with bias, 3.59M more than those without."""
    config = RecurrentConfig(top_k=2, state_size=128, linear_bias=linear_bias)
    with torch.device("meta"):
        routers = nn.ModuleList([config.build(hidden_size, 16) for _ in range(layers)])
    for router in routers[1:]:
        router.share(routers[0])  # type: ignore[operator]
    assert sum(parameter.numel() for parameter in routers.parameters()) == count


def test_cell_and_shared_projector_belong_to_the_first_layer() -> None:
    routers: Any = make_routers(shared_projector=True)
    assert {name for name, _ in routers.named_parameters()} == {
        *(f"0.cell.{name}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        *(f"0.projector.{name}" for name in ("weight", "bias")),
        *(f"{layer}.{name}" for layer in range(3) for name in ("weight", "bias")),
    }
    assert routers[2].cell is routers[0].cell
    assert routers[2].projector is routers[0].projector
    own: Any = make_routers()
    assert own[2].projector is not own[0].projector


@pytest.mark.parametrize("initialization", ["torch", "normal"])
def test_initial_values(initialization: str) -> None:
    config = RecurrentConfig.from_dict({"top_k": 2, "initialization": initialization, "mode": "learned_start"})
    router = config.build(300, 16)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.fill_(9.0)
    router.reset_parameters(std=0.03)
    bounds = {"projector": 300**-0.5, "cell": 128**-0.5}
    for name, parameter in router.named_parameters():
        bound = bounds.get(name.split(".")[0], 128**-0.5)
        if name == "cell.start":
            assert not parameter.any()
        elif initialization == "torch":
            assert 0.5 * bound < parameter.abs().max() <= bound, name
        else:
            assert parameter.std().item() == pytest.approx(0.03, rel=0.6 if parameter.numel() < 100 else 0.1), name


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("cell", [False, True])
def test_frozen_parts_get_no_gradient(head: bool, cell: bool) -> None:
    routers = make_routers(freeze_head=head, freeze_cell=cell)
    run(routers, make_inputs())[-1].weight_TK.square().sum().backward()
    parts = {"weight": head, "bias": head, "cell": cell, "projector": False}
    for name, parameter in routers[2].named_parameters():
        assert (parameter.grad is None) == parts[name.split(".")[0]], name
    for parameter in routers[0].cell.parameters():  # type: ignore[union-attr]
        assert (parameter.grad is None) == cell


# --- Where gradients go, what a token's state depends on --------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "below", "recurrent"),
    [
        ({"mode": "full"}, True, True),
        ({"mode": "detached"}, False, True),
        ({"mode": "no_passing"}, False, False),
        ({"mode": "learned_start"}, False, True),
        ({"mode": "no_passing", "residual": 0.5, "accumulate_residual": True}, True, False),
        ({"mode": "no_passing", "residual": 0.5}, False, False),
        ({"mode": "no_passing", "residual": 0.5, "detach_residual": True}, False, False),
    ],
)
def test_the_recurrent_gradient(fields: dict[str, Any], below: bool, recurrent: bool) -> None:
    """Inputs are given, so that no gradient runs through experts: from layer 2 to the projector of layer 0."""
    routers: Any = make_routers(**fields)
    run(routers, make_inputs())[2].logits_TN.square().sum().backward()
    gradient = routers[0].projector.weight.grad
    assert (gradient is not None and bool(gradient.any())) == below
    assert bool(routers[0].cell.weight_hh.grad.any()) == recurrent
    middle = routers[1].projector.weight.grad
    expected = below or (fields.get("residual", 0) > 0 and not fields.get("detach_residual"))
    assert (middle is not None and bool(middle.any())) == expected


def test_a_residual_is_detached_on_request() -> None:
    """The value is the same."""
    plain, detached = (
        make_routers(mode="no_passing", residual=0.5, detach_residual=detach) for detach in (False, True)
    )
    for one, other in zip(run(plain, make_inputs()), run(detached, make_inputs()), strict=True):
        assert torch.equal(one.logits_TN, other.logits_TN)


@pytest.mark.parametrize("cell", CELLS)
def test_a_token_looks_at_its_own_layers_only(cell: CellName) -> None:
    routers, inputs = make_routers(cell=cell, residual=0.5), make_inputs()
    changed = [x_TD.clone() for x_TD in inputs]
    changed[0][3] += 1
    before, after = run(routers, inputs), run(routers, changed)
    others_T = torch.arange(T) != 3
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one.logits_TN[others_T], other.logits_TN[others_T], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(one.logits_TN[3], other.logits_TN[3])
    order_T = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    for one, other in zip(before, run(routers, [x_TD[order_T] for x_TD in inputs]), strict=True):
        torch.testing.assert_close(other.logits_TN, one.logits_TN[order_T], rtol=1e-12, atol=1e-12)


def test_every_forward_pass_starts_anew() -> None:
    routers, inputs = make_routers(), make_inputs()
    for one, other in zip(run(routers, inputs), run(routers, inputs), strict=True):
        assert torch.equal(one.logits_TN, other.logits_TN)


def test_a_single_layer_is_the_same_with_and_without_passing() -> None:
    (full,), (alone,) = (run(make_routers(1, mode=mode), make_inputs(1)) for mode in ("full", "no_passing"))
    assert torch.equal(full.logits_TN, alone.logits_TN)


# --- Checkpointing ----------------------------------------------------------------------------------------------------


def run_blocks(spec: MoESpec, use_reentrant: bool, checkpointed: Sequence[bool]) -> dict[str, Tensor]:
    """Loss and gradients of blocks with residual stream, of which some are checkpointed. A dense layer is in between."""
    torch.manual_seed(0)
    blocks = nn.ModuleList([MoEBlock(spec, D, layer).double() for layer in (0, 1, 3)])
    for block in blocks[1:]:
        block.gate.share(blocks[0].gate)  # type: ignore[operator, union-attr]
    with torch.no_grad():
        for parameter in blocks.parameters():
            parameter.normal_(std=0.5)
    x_TD = make_inputs(1)[0][:6].requires_grad_()
    y_TD, context = x_TD, RoutingContext(batch_size=2)
    for block, again in zip(blocks, checkpointed, strict=True):
        change = checkpoint(block, y_TD, context, use_reentrant=use_reentrant) if again else block(y_TD, context)
        y_TD = y_TD + change  # type: ignore[operator]
    objective = BalanceObjective([LoadBalancing(coefficient=0.3)], torch.full((2,), 0.5, dtype=torch.float64))
    total = objective.add_to(y_TD.square().sum(), objective.by_name(context), context)
    (2 * total).backward()
    assert not context.state_gradients
    found = {name: parameter.grad for name, parameter in blocks.named_parameters() if parameter.grad is not None}
    return {**found, "input": x_TD.grad, "loss": total.detach()}  # type: ignore[dict-item]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cell": "lstm", "residual": 0.5},
        {"mode": "detached", "residual": 1.0, "accumulate_residual": True},
        {"mode": "no_passing"},
        {"mode": "learned_start", "residual": 0.5, "detach_residual": True},
        {"shared_projector": True},
    ],
    ids=str,
)
def test_three_layers_of_which_any_are_checkpointed(fields: dict[str, Any], use_reentrant: bool) -> None:
    spec = MoESpec.from_dict(
        {
            "experts": {"num_experts": N, "intermediate_size": 3},
            "router": {"type": "recurrent", "top_k": 2, "state_size": P, **fields},
        }
    )
    expected = run_blocks(spec, use_reentrant, (False, False, False))
    assert expected["0.gate.projector.weight"].any()
    for checkpointed in itertools.product((False, True), repeat=3):
        found = run_blocks(spec, use_reentrant, checkpointed)
        torch.testing.assert_close(
            found, expected, rtol=1e-10, atol=1e-12, msg=lambda text, which=checkpointed: f"{which}: {text}"
        )


# --- Config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "carries"),
    [
        ({"mode": "full"}, True),
        ({"mode": "detached"}, True),
        ({"mode": "no_passing"}, False),
        ({"mode": "learned_start"}, False),
        ({"mode": "no_passing", "residual": 0.5}, True),
    ],
)
def test_what_travels_between_layers(fields: dict[str, Any], carries: bool) -> None:
    config = RecurrentConfig.from_dict({"top_k": 2, **fields})
    assert config.carries_state == carries
    assert config.unservable is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 5}, r"top_k = 5 is larger than num_experts \(4\)"),
        ({"top_k": 1}, "normalize_top_k = True gives the only pick"),
        ({"top_k": 2, "state_size": 0}, "state_size = 0"),
        ({"top_k": 2, "cell": "mgu"}, "cell = 'mgu' is not one of the choices"),
        ({"top_k": 2, "residual": -1.0}, "residual = -1.0"),
        ({"top_k": 2, "head_size": 8}, "head_size = 8 has no effect on a linear head"),
        ({"top_k": 2, "detach_residual": True}, "detach_residual = True has no effect without residual"),
        ({"top_k": 2, "accumulate_residual": True}, "accumulate_residual = True has no effect without residual"),
    ],
)
def test_what_can_not_work_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    values = {"experts": {"num_experts": N, "intermediate_size": 5}, "router": {"type": "recurrent", **fields}}
    with pytest.raises(ConfigError, match=f"moe.router.{message}"):
        MoESpec.from_dict(values, where="moe")


def test_residual_logits_must_be_of_the_same_experts() -> None:
    small, large = (RecurrentConfig(top_k=2, residual=0.5).build(D, count) for count in (4, 8))
    with pytest.raises(ConfigError, match=r"router.residual = 0.5 adds logits of layers with 4 and 8 experts"):
        large.share(small)
    state_only = [RecurrentConfig(top_k=2).build(D, count) for count in (4, 8)]
    state_only[1].share(state_only[0])
    assert isinstance(state_only[1], RecurrentRouter)
