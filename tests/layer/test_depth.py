"""Mixture of depths: who passes, what the others cost and give, the causal rule, its loss, and where it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hf.tiny import backbone_config, token_ids
from tests.layer import test_router_matrix as matrix
from tests.layer.router_rows import ROUTERS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moesaic
from moesaic.errors import ConfigError, UnsupportedDecoding
from moesaic.layer import (
    DepthConfig,
    DepthLoss,
    LayerLoad,
    LoadBalancing,
    MoEBlock,
    MoESpec,
    Routing,
    RoutingContext,
    ZLoss,
)
from moesaic.layer.balance import BalanceObjective

N, D, B, LENGTH = 4, 6, 2, 8
THRESHOLD = {"depth": {"capacity": 0.5, "decoding": "threshold"}, "balance": [{"type": "depth", "coefficient": 0.01}]}


def make_spec(**fields: Any) -> MoESpec:
    base = {
        "experts": {"num_experts": N, "intermediate_size": 5},
        "router": {"type": "top_k", "top_k": 2},
        "depth": {"capacity": 0.5},
    }
    return MoESpec.from_dict(base | fields)


def make_block(*, training: bool = True, **fields: Any) -> MoEBlock:
    torch.manual_seed(0)
    block = MoEBlock(make_spec(**fields), D).double().train(training)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    return block


def make_input(seed: int = 0) -> Tensor:
    return torch.randn(B, LENGTH, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(block: MoEBlock, x_BTD: Tensor, **context: Any) -> tuple[Tensor, Routing]:
    full = RoutingContext(batch_size=x_BTD.shape[0], **context)
    y_BTD = block(x_BTD, full)
    return y_BTD, full.records[0]


def logits_of(block: MoEBlock, x_BTD: Tensor) -> Tensor:
    assert block.depth_gate is not None
    return (x_BTD @ block.depth_gate.weight.T).squeeze(-1).detach()


# --- Who passes -------------------------------------------------------------------------------------------------------


def test_tokens_with_the_largest_logits_pass() -> None:
    """C = 2 of 5 tokens for a capacity of 0.3; ties go to the earlier token (arXiv 2404.02258, eq. 1)."""
    passing = DepthConfig(capacity=0.3).choose(torch.tensor([0.1, -2.0, 3.0, 0.1, -1.0]), None, training=True)
    assert passing.passes_T.tolist() == [True, False, True, False, False]
    assert passing.scale_T.tolist() == pytest.approx([0.1, -2.0, 3.0, 0.1, -1.0])


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_choice_equals_a_plain_reference(data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    tenths = data.draw(st.integers(1, 10))
    grid = st.lists(st.integers(-2, 2).map(float), min_size=length, max_size=length)
    rows = data.draw(st.lists(grid, min_size=batch, max_size=batch))
    mask = data.draw(
        st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch)
    )
    context = RoutingContext(batch_size=batch, mask_T=torch.tensor(mask).flatten())
    logits_T = torch.tensor(rows).flatten()
    passing = DepthConfig(capacity=tenths / 10).choose(logits_T, context, training=True)
    expected = []
    for row, real in zip(rows, mask, strict=True):
        tokens = [token for token in range(length) if real[token]]
        count = -(-len(tokens) * tenths // 10)
        best = sorted(tokens, key=lambda token, row=row: -row[token])[:count]
        expected += [token in best for token in range(length)]
    assert passing.passes_T.tolist() == expected
    by_threshold = DepthConfig(decoding="threshold").choose(logits_T, context, training=False)
    assert by_threshold.passes_T.tolist() == [
        value > 0 and real
        for row, reals in zip(rows, mask, strict=True)
        for value, real in zip(row, reals, strict=True)
    ]


# --- What the layer gives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["logit", "sigmoid"])
@pytest.mark.parametrize(
    "router", [{"type": "top_k", "top_k": 2}, {"type": "soft_slots"}, {"type": "merged_top_k", "top_k": 2}]
)
def test_output_is_that_of_the_tokens_that_pass_scaled_and_zero_elsewhere(scale: str, router: dict[str, Any]) -> None:
    """As if the sequence consisted of the tokens that pass, whatever the router."""
    fields = {"shared_experts": {"sigmoid_gate": True}, "router": router}
    block = make_block(depth={"capacity": 0.5, "scale": scale}, **fields)
    plain = make_block(depth=None, **fields)
    plain.load_state_dict(block.state_dict() | {}, strict=False)
    x_BTD = make_input()
    y_BTD, routing = run(block, x_BTD)
    logits_BT = logits_of(block, x_BTD)
    for row in range(B):
        passes_T = torch.zeros(LENGTH, dtype=torch.bool)
        passes_T[logits_BT[row].topk(4).indices] = True
        assert not y_BTD[row, ~passes_T].any()
        factor_T1 = (logits_BT[row] if scale == "logit" else logits_BT[row].sigmoid())[passes_T].unsqueeze(-1)
        torch.testing.assert_close(y_BTD[row, passes_T], factor_T1 * plain(x_BTD[row, passes_T]))
        index_TK = routing.index_TK.view(B, LENGTH, -1)[row]
        assert (index_TK[~passes_T] == N).all()
        assert (index_TK[passes_T] < N).all()
        assert routing.skipped_T is not None
        assert torch.equal(routing.skipped_T.view(B, LENGTH)[row], ~passes_T)


def test_skipped_tokens_cost_no_expert_and_no_shared_expert() -> None:
    block = make_block(shared_experts={})
    rows = []
    assert block.shared_experts is not None
    block.shared_experts.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[0]))
    _, routing = run(block, make_input())
    assert rows == [B * LENGTH // 2]
    load = LayerLoad.of(routing)
    assert int(load.load_N.sum()) == 2 * B * LENGTH // 2
    assert int(load.chosen_M.sum()) == 2 * B * LENGTH // 2
    assert load.experts_per_token == 1
    assert not routing.weight_TK[routing.index_TK == N].any()


def test_full_capacity_passes_all_tokens() -> None:
    block, plain = make_block(depth={"capacity": 1.0}), make_block(depth=None)
    plain.load_state_dict(block.state_dict(), strict=False)
    x_BTD = make_input()
    y_BTD, routing = run(block, x_BTD)
    torch.testing.assert_close(y_BTD, logits_of(block, x_BTD).unsqueeze(-1) * run(plain, x_BTD)[0])
    assert routing.skipped_T is not None
    assert not routing.skipped_T.any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(side: str, training: bool) -> None:
    block = make_block(training=training, shared_experts={}, **THRESHOLD)
    x_BTD, filler_BTD = make_input(), 100 * torch.ones(B, 3, D, dtype=torch.float64)
    order = 1 if side == "right" else -1
    mask_BT = torch.cat([torch.ones(B, LENGTH), torch.zeros(B, 3)][::order], dim=1).bool()
    padded_BTD = torch.cat([x_BTD, filler_BTD][::order], dim=1)
    y_BTD, routing = run(block, padded_BTD, mask_T=mask_BT.flatten())
    expected_BTD, expected = run(block, x_BTD)
    torch.testing.assert_close(y_BTD[mask_BT], expected_BTD.flatten(0, 1))
    assert not y_BTD[~mask_BT].any()
    assert torch.equal(routing.index_TK[mask_BT.flatten()], expected.index_TK)
    padded, plain = RoutingContext(B, mask_T=mask_BT.flatten()), RoutingContext(B)
    for loss in (LoadBalancing(coefficient=1.0), ZLoss(coefficient=1.0), DepthLoss(coefficient=1.0)):
        torch.testing.assert_close(loss.of_sequences(routing, padded), loss.of_sequences(expected, plain))


@pytest.mark.parametrize("fields", [{}, THRESHOLD])
@pytest.mark.parametrize("training", [False, True])
def test_later_tokens_matter_only_where_declared(fields: dict[str, Any], training: bool) -> None:
    block = make_block(training=training, shared_experts={}, **fields)
    expected_BTD, _ = run(block, make_input())
    moved = False
    for cut in range(1, LENGTH):
        changed_BTD = make_input()
        changed_BTD[:, cut:] *= -3
        moved |= not torch.allclose(run(block, changed_BTD)[0][:, :cut], expected_BTD[:, :cut], rtol=1e-10)
        alone = make_input()
        alone[1] *= -3
        torch.testing.assert_close(run(block, alone)[0][0], expected_BTD[0])
    assert moved == ("later_tokens" in make_spec(**fields).depends_on(training))


@pytest.mark.parametrize("training", [False, True])
def test_goes_with_every_router(training: bool) -> None:
    for name, row in ROUTERS.items():
        spec = make_spec(
            experts={"num_experts": matrix.N, "intermediate_size": 4}, router=row.values, shared_experts={}
        )
        torch.manual_seed(0)
        block = MoEBlock(spec, matrix.D).double().train(training)
        context, x_BTD = matrix.make_context(), matrix.make_input().requires_grad_()
        y_BTD = block(x_BTD, context)
        routing = context.records[0]
        assert routing.skipped_T is not None, name
        skipped_BT = routing.skipped_T.view(y_BTD.shape[:2])
        assert int(skipped_BT.sum()) == matrix.B * (matrix.LENGTH // 2), name
        assert not y_BTD[skipped_BT].any(), name
        loss_B = LoadBalancing(coefficient=1.0).of_sequences(routing, context)
        (gradient,) = torch.autograd.grad(y_BTD.square().sum() + loss_B.sum(), x_BTD)
        assert gradient.isfinite().all(), name


# --- Losses and gradients ---------------------------------------------------------------------------------------------


def test_depth_loss_is_the_cross_entropy_of_passing() -> None:
    """Logits log 3 and log 1: -log 3/4 where the first passes, -log 1/2 where the second does not."""
    passing = DepthConfig(capacity=0.5).choose(torch.tensor([3.0, 1.0]).log(), None, training=True)
    assert passing.loss_T.tolist() == pytest.approx([0.28768207, 0.69314718])
    block = make_block(**THRESHOLD)
    x_BTD = make_input()
    _, routing = run(block, x_BTD)
    logits_BT = logits_of(block, x_BTD)
    assert routing.skipped_T is not None
    target_BT = 1 - routing.skipped_T.view(B, LENGTH).double()
    p_BT = logits_BT.sigmoid()
    expected_B = -(target_BT * p_BT.log() + (1 - target_BT) * (1 - p_BT).log()).mean(-1)
    torch.testing.assert_close(DepthLoss(coefficient=1.0).of_sequences(routing, RoutingContext(B)), expected_B)


def test_other_losses_are_those_of_the_tokens_that_pass() -> None:
    block = make_block()
    x_BTD = make_input()
    _, routing = run(block, x_BTD)
    assert routing.skipped_T is not None
    passes_T = ~routing.skipped_T
    alone = block.gate(x_BTD.flatten(0, 1)[passes_T], RoutingContext(B))
    for loss in (LoadBalancing(coefficient=1.0), ZLoss(coefficient=1.0)):
        torch.testing.assert_close(
            loss.of_sequences(routing, RoutingContext(B)), loss.of_sequences(alone, RoutingContext(B))
        )


def test_gradient_reaches_the_depth_gate_through_the_output_and_the_loss() -> None:
    block = make_block(**THRESHOLD)
    assert block.depth_gate is not None
    y_BTD, routing = run(block, make_input())
    weight = block.depth_gate.weight
    (by_output,) = torch.autograd.grad(y_BTD.square().sum(), weight, retain_graph=True)
    (by_loss,) = torch.autograd.grad(DepthLoss(coefficient=1.0).of_sequences(routing, RoutingContext(B)).sum(), weight)
    assert by_output.any()
    assert by_loss.any()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_neither_loss_nor_gradients(use_reentrant: bool) -> None:
    def total(checkpointed: bool) -> dict[str, Tensor | None]:
        block = make_block(shared_experts={}, **THRESHOLD)
        x_BTD, context = make_input().requires_grad_(), RoutingContext(B)
        y_BTD = (
            checkpoint(block, x_BTD, context, use_reentrant=use_reentrant) if checkpointed else block(x_BTD, context)
        )
        losses = [LoadBalancing(coefficient=0.3), DepthLoss(coefficient=0.2)]
        objective = BalanceObjective(losses, torch.full((B,), 0.5, dtype=torch.float64))
        objective.add_to(y_BTD.square().sum(), objective.by_name(context), context).backward()  # type: ignore[union-attr]
        return {name: parameter.grad for name, parameter in block.named_parameters()} | {"input": x_BTD.grad}

    torch.testing.assert_close(total(True), total(False), rtol=1e-12, atol=1e-13)


def test_trained_threshold_passes_about_the_share_that_training_passed() -> None:
    """Logistic regression on the choice moves zero to where the choice is made."""
    spec = make_spec(depth={"capacity": 0.25, "decoding": "threshold"}, balance=THRESHOLD["balance"])
    torch.manual_seed(0)
    block = MoEBlock(spec, D).train()
    assert block.depth_gate is not None
    optimizer = torch.optim.SGD(block.depth_gate.parameters(), lr=1.0)
    # A constant feature, as a norm's bias would give, lets the logits move together.
    x_BTD = torch.cat([torch.randn(4, 256, D - 1), torch.ones(4, 256, 1)], dim=-1)
    for _ in range(200):
        optimizer.zero_grad()
        context = RoutingContext(4)
        block(x_BTD, context)
        DepthLoss(coefficient=1.0).of_sequences(context.records[0], context).mean().backward()
        optimizer.step()
    context = RoutingContext(4)
    block.eval()(x_BTD, context)
    skipped_T = context.records[0].skipped_T
    assert skipped_T is not None
    assert 1 - skipped_T.double().mean().item() == pytest.approx(0.25, abs=0.03)


def test_compiles_to_one_graph() -> None:
    block = make_block(training=False, shared_experts={}, **THRESHOLD)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(make_input(), RoutingContext(B)), block(make_input(), RoutingContext(B)))


# --- Models -----------------------------------------------------------------------------------------------------------


def make_model(**fields: Any) -> moesaic.MoesaicForCausalLM:
    torch.manual_seed(0)
    spec = make_spec(shared_experts={}, layers={"only": [0, 2]}, **fields)
    model = moesaic.build(backbone_config("llama"), spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.2)
    return model.eval()


def test_cached_generation_equals_the_full_pass() -> None:
    model = make_model(**THRESHOLD)
    ids = token_ids(2, 9, 1)
    out = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=0)
    full = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(out, full)
    skipped = model(ids, output_routing=True).routing.records[0].skipped_T
    assert 0 < int(skipped.sum()) < ids.numel()


def test_models_without_a_threshold_can_not_decode() -> None:
    with pytest.raises(UnsupportedDecoding, match=r"moe\.depth: whether a token passes depends on later tokens"):
        make_model().generate(token_ids(1, 4, 1), max_new_tokens=2)


def test_saved_and_loaded_model_gives_the_same_logits(tmp_path: Any) -> None:
    model = make_model(**THRESHOLD)
    model.save_pretrained(tmp_path)
    loaded = moesaic.MoesaicForCausalLM.from_pretrained(tmp_path).eval()
    ids = token_ids(2, 9, 1)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    training = model.train()(ids, labels=ids)
    assert training.aux_losses["depth"] > 0


# --- Refusals ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no capacity": ({"depth": {"capacity": 0}}, r"depth\.capacity = 0 is not valid"),
    "more than all": ({"depth": {"capacity": 1.5}}, r"depth\.capacity = 1.5 is not valid"),
    "threshold that nothing teaches": (
        {"depth": {"decoding": "threshold"}},
        r"depth\.decoding = 'threshold' is not taught without the balance loss depth; add it to balance",
    ),
    "loss that nothing uses": (
        {"balance": THRESHOLD["balance"]},
        r"balance\.0\.type = 'depth' teaches what only depth\.decoding: threshold uses; remove it",
    ),
    "loss without depth": ({"depth": None, "balance": THRESHOLD["balance"]}, r"balance\.0\.type = 'depth' teaches"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_configuration_is_refused_by_name(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        make_spec(**fields)


def test_facts_of_the_spec() -> None:
    spec = make_spec()
    assert spec.may_skip
    assert spec.depends_on(training=False) == {"later_tokens"}
    causal = make_spec(**THRESHOLD)
    assert causal.unservable is None
    assert causal.depends_on(training=True) == {"later_tokens"}
