"""Null experts: AdaMoE's worked numbers, a slow reference, what reaches the gate, load at balance, refusals."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

from moesaic.errors import ConfigError
from moesaic.layer import (
    LayerLoad,
    LoadBalancing,
    MoEBlock,
    MoESpec,
    NullExpertsConfig,
    NullExpertsRouter,
    Routing,
    RoutingContext,
    TopKConfig,
)

N, D = 4, 6


def route(logits: list[list[float]] | Tensor, num_null: int, **fields: Any) -> Routing:
    """Route tokens whose logits are given: a router with identity weights, in float64."""
    logits_TM = torch.as_tensor(logits, dtype=torch.float64)
    config = NullExpertsConfig.from_dict({"num_null": num_null, **fields})
    router = config.build(logits_TM.shape[1], logits_TM.shape[1] - num_null).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(logits_TM.shape[1]))
    return router(logits_TM)


def log(scores: list[list[float]], shift: float = 0.0) -> list[list[float]]:
    """Logits whose softmax is `scores`."""
    return [[math.log(value) + shift for value in row] for row in scores]


def balance(routing: Routing, context: RoutingContext | None = None, **fields: Any) -> Tensor:
    """The loss as the paper counts it: K times ours."""
    loss = LoadBalancing(coefficient=1.0, **fields)
    return routing.top_k * loss.per_sequence(routing, context or RoutingContext())


def make_block(router: dict[str, Any], seed: int = 0) -> MoEBlock:
    spec = MoESpec.from_dict({"experts": {"num_experts": N, "intermediate_size": 5}, "router": router})
    torch.manual_seed(seed)
    block = MoEBlock(spec, D).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.7)
    return block


def make_input(tokens: int = 50) -> Tensor:
    return torch.randn(tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# --- Worked numbers ---------------------------------------------------------------------------------------------------

SCORES = [
    [0.4, 0.2, 0.1, 0.2, 0.1],
    [0.05, 0.05, 0.1, 0.4, 0.4],
    [0.25, 0.125, 0.5, 0.0625, 0.0625],
    [0.1, 0.2, 0.05, 0.4, 0.25],
]


@pytest.mark.parametrize("shift", [0.0, -3.5])
def test_picks_weights_and_load(shift: float) -> None:
    """Three experts and two nulls, three picks (arXiv 2406.13233, sections 3.1 and 3.4)."""
    routing = route(log(SCORES, shift), 2, top_k=3)
    assert routing.choice_TK.tolist() == [[0, 1, 3], [3, 4, 2], [2, 0, 1], [3, 4, 1]]
    assert routing.index_TK.tolist() == [[0, 1, 3], [3, 3, 2], [2, 0, 1], [3, 3, 1]]
    expected = [[2 / 3, 1 / 3, 0], [0, 0, 1], [4 / 7, 2 / 7, 1 / 7], [0, 0, 1]]
    torch.testing.assert_close(routing.weight_TK, torch.tensor(expected, dtype=torch.float64))
    load = LayerLoad.of(routing)
    assert load.experts_per_token == 7 / 4
    assert load.null_share == 5 / 12
    assert load.chosen_M.tolist() == [2, 3, 2, 3, 2]


def test_weights_over_all_selected_columns_leave_the_nulls_their_share() -> None:
    routing = route(log(SCORES), 2, top_k=3, normalize_over="selected")
    torch.testing.assert_close(routing.weight_TK[0], torch.tensor([0.5, 0.25, 0.0], dtype=torch.float64))
    assert routing.identity_weight_T is None
    identity = route(log(SCORES), 2, top_k=3, normalize_over="selected", null_output="identity")
    assert torch.equal(identity.weight_TK, routing.weight_TK)
    torch.testing.assert_close(
        identity.identity_weight_T, torch.tensor([0.25, 8 / 9, 0.0, 0.65 / 0.85], dtype=torch.float64)
    )


def test_pooled_balance_loss() -> None:
    """Equation 6: the nulls' f is their mean; and the loss over all columns that table 3 calls worse."""
    routing = route(log(SCORES), 2, top_k=3)
    assert balance(routing).item() == pytest.approx(2.97265625)
    assert balance(routing, pool_nulls=False).item() == pytest.approx(3.01171875)


def test_balanced_routing_has_loss_k_and_load_kn_over_columns() -> None:
    """N = 4, m = 5, K = 4: each of 36 tokens takes the next four columns; the scores are uniform."""
    start_T = torch.arange(36) * 4
    choice_TK = (start_T.unsqueeze(-1) + torch.arange(4)) % 9
    scores_TM = torch.full((36, 9), 1 / 9, dtype=torch.float64)
    index_TK = choice_TK.clamp(max=4)
    routing = Routing(index_TK, scores_TM[:, :4], scores_TM.log(), scores_TM, scores_TM, None, 5, choice_TK)
    assert LayerLoad.of(routing).experts_per_token.item() == pytest.approx(16 / 9)
    assert NullExpertsConfig(top_k=4, num_null=5).build(D, 4).picks == pytest.approx(16 / 9)
    assert balance(routing).item() == pytest.approx(4.0)
    assert balance(routing, pool_nulls=False).item() == pytest.approx(4.0)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_pooling_does_not_see_which_null_is_picked(scope: str) -> None:
    """Only the plain loss does, the scores being fixed."""
    choice_TK, others_TK = torch.tensor([[0, 3], [3, 1], [2, 3]]), torch.tensor([[0, 3], [4, 1], [2, 4]])
    scores_TM = torch.tensor([[0.3, 0.1, 0.1, 0.4, 0.1], [0.1, 0.2, 0.1, 0.5, 0.1], [0.2, 0.1, 0.3, 0.2, 0.2]])

    def value(choice_TK: Tensor, pool_nulls: bool) -> float:
        record = Routing(choice_TK.clamp(max=3), scores_TM[:, :2], scores_TM, scores_TM, scores_TM, None, 2, choice_TK)
        return balance(record, scope=scope, pool_nulls=pool_nulls).item()

    assert value(choice_TK, True) == pytest.approx(value(others_TK, True))
    assert value(choice_TK, False) != pytest.approx(value(others_TK, False))


def test_the_pooled_loss_sees_the_nulls_as_one_bucket() -> None:
    """With F the mean number of nulls a token picks and P their total score, their part is (N + m) / m F P."""
    routing = route(torch.randn(40, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 5, top_k=4)
    load, scores_M = LayerLoad.of(routing), routing.scores_TN.mean(0)
    experts = 9 * (load.chosen_M[:4] / 40 * scores_M[:4]).sum()
    nulls = 9 / 5 * load.chosen_M[4:].sum() / 40 * scores_M[4:].sum()
    torch.testing.assert_close(balance(routing)[0], experts + nulls)


# --- A token that picks nulls only ------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize_over", ["experts", "selected", "none"])
def test_a_token_of_nulls_only_gives_zero_and_finite_gradients(normalize_over: str) -> None:
    scores = [[1 / 19, 1 / 19, 1 / 19, 8 / 19, 8 / 19], [0.4, 0.3, 0.1, 0.1, 0.1]]
    logits_TM = torch.tensor(log(scores), dtype=torch.float64, requires_grad=True)
    config = NullExpertsConfig.from_dict({"top_k": 2, "num_null": 2, "normalize_over": normalize_over})
    router = config.build(5, 3).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(5))
    routing = router(logits_TM)
    assert routing.index_TK.tolist() == [[3, 3], [0, 1]]
    assert routing.weight_TK[0].tolist() == [0, 0]
    (routing.weight_TK * torch.tensor([1.0, 3.0])).sum().backward()
    assert logits_TM.grad is not None
    assert router.weight.grad is not None
    assert logits_TM.grad[0].tolist() == [0] * 5
    assert logits_TM.grad[1].any()
    assert router.weight.grad.isfinite().all()


def test_a_block_of_nulls_only_gives_zero_and_its_experts_get_a_gradient() -> None:
    """Of zero, but not None: data-parallel training waits for every gradient."""
    block = make_block({"type": "null_experts", "top_k": 2, "num_null": 3})
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.weight[N:, 0] = 1.0
    x_TD = make_input()
    x_TD[:, 0] = x_TD[:, 0].abs() + 1
    x_TD.requires_grad_()
    context = RoutingContext()
    y_TD = block(x_TD, context)
    assert not y_TD.any()
    y_TD.square().sum().backward()
    assert x_TD.grad is not None
    assert not x_TD.grad.any()
    for parameter in block.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
    assert LayerLoad.of(context.records[0]).experts_per_token == 0


def test_identity_nulls_pass_the_token_on() -> None:
    fields = {"type": "null_experts", "top_k": 2, "num_null": 3, "normalize_over": "selected"}
    block, x_TD = make_block({**fields, "null_output": "identity"}), make_input()
    plain = make_block(fields)
    plain.load_state_dict(block.state_dict())
    context = RoutingContext()
    y_TD = block(x_TD, context)
    weight_T1 = context.records[0].identity_weight_T.unsqueeze(-1)  # type: ignore[union-attr]
    assert weight_T1.any()
    torch.testing.assert_close(y_TD, plain(x_TD) + weight_T1 * x_TD)


def test_more_picks_than_nulls_always_run_an_expert() -> None:
    """K - m experts at least, however low their scores: here they underflow beside the nulls'."""
    routing = route([[-300.0, -301.0, -500.0, 0.0, 0.0]], 2, top_k=4)
    assert routing.choice_TK.tolist() == [[3, 4, 0, 1]]
    expected = torch.tensor([[0, 0, 1 / (1 + math.exp(-1)), 1 / (1 + math.e)]], dtype=torch.float64)
    torch.testing.assert_close(routing.weight_TK, expected)


def test_a_margin_lets_an_expert_go_before_a_null_that_is_hardly_better() -> None:
    scores = [[0.2, 0.1, 0.2 + 1e-6, 0.3, 0.2 - 1e-6]]
    assert route(log(scores), 3, top_k=2).choice_TK.tolist() == [[3, 2]]
    routing = route(log(scores), 3, top_k=2, tie_margin=1e-4)
    assert routing.choice_TK.tolist() == [[3, 0]]
    torch.testing.assert_close(routing.scores_TN, torch.tensor(scores, dtype=torch.float64))


# --- A slow reference -------------------------------------------------------------------------------------------------


def reference(logits: list[float], num_null: int, top_k: int, over: str) -> tuple[list[int], list[float], float]:
    """Picks, weights and the weight of the token itself, in plain floats."""
    exponentials = [math.exp(value - max(logits)) for value in logits]
    scores = [value / sum(exponentials) for value in exponentials]
    experts = len(logits) - num_null
    picks = sorted(range(len(logits)), key=lambda column: -logits[column])[:top_k]
    total = {
        "experts": sum(scores[column] for column in picks if column < experts) or 1.0,
        "selected": sum(scores[column] for column in picks),
        "none": 1.0,
    }[over]
    weights = [scores[column] / total if column < experts else 0.0 for column in picks]
    return picks, weights, sum(scores[column] / total for column in picks if column >= experts)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[float]], int, int, str]:
    num_experts, num_null = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    columns = num_experts + num_null
    # A grid of halves ties often.
    row = st.lists(st.integers(-6, 6).map(lambda step: step / 2), min_size=columns, max_size=columns)
    logits = draw(st.lists(row, min_size=1, max_size=4))
    over = draw(st.sampled_from(["experts", "selected", "none"]))
    return logits, num_null, draw(st.integers(1, columns)), over


@given(cases())
@settings(deadline=None, max_examples=200)
def test_router_equals_the_slow_reference(case: tuple[list[list[float]], int, int, str]) -> None:
    logits, num_null, top_k, over = case
    output = "zero" if over == "experts" else "identity"
    routing = route(logits, num_null, top_k=top_k, normalize_over=over, null_output=output)
    for token, row in enumerate(logits):
        picks, weights, identity = reference(row, num_null, top_k, over)
        assert routing.choice_TK[token].tolist() == picks
        assert routing.index_TK[token].tolist() == [min(column, len(row) - num_null) for column in picks]
        assert routing.weight_TK[token].tolist() == pytest.approx(weights, rel=1e-12)
        if routing.identity_weight_T is not None:
            assert routing.identity_weight_T[token].item() == pytest.approx(identity, rel=1e-12)


def test_gradients_of_the_weights_are_those_of_finite_differences() -> None:
    logits_TM = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for over in ("experts", "selected", "none"):
        config = NullExpertsConfig.from_dict({"top_k": 3, "num_null": 3, "normalize_over": over})
        router = config.build(7, 4).double()
        with torch.no_grad():
            router.weight.copy_(torch.eye(7))
        assert torch.autograd.gradcheck(lambda x_TD, router=router: router(x_TD).weight_TK, (logits_TM,))


# --- Parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool_nulls", [True, False])
def test_without_nulls_it_is_top_k_bit_for_bit(pool_nulls: bool) -> None:
    results = []
    for router in (
        {"type": "null_experts", "top_k": 2, "num_null": 0},
        {"type": "top_k", "top_k": 2, "softmax_over": "selected"},
    ):
        block, context, x_TD = make_block(router), RoutingContext(batch_size=5), make_input().requires_grad_()
        y_TD = block(x_TD, context)
        loss_B = LoadBalancing(coefficient=1.0, pool_nulls=pool_nulls).per_sequence(context.records[0], context)
        (y_TD.square().sum() + loss_B.sum()).backward()
        routing = context.records[0]
        gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
        results.append(
            {"y": y_TD, "loss": loss_B, "x": x_TD.grad, "weight": routing.weight_TK, "index": routing.index_TK}
            | gradients
        )
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_longcat_flash_computes_the_same(seed: int) -> None:
    """Zero-computation experts of transformers' LongCat-Flash, whose output adds weight times the token."""
    config = LongcatFlashConfig(
        hidden_size=D, n_routed_experts=N, zero_expert_num=4, moe_topk=3, expert_ffn_hidden_size=5
    )
    torch.manual_seed(seed)
    stock = LongcatFlashMoE(config)
    block = make_block(
        {
            "type": "null_experts",
            "top_k": 3,
            "num_null": 4,
            "normalize_over": "none",
            "null_output": "identity",
            "scaling_factor": config.routed_scaling_factor,
            "selection_bias": True,
        }
    ).float()
    with torch.no_grad():
        stock.router.classifier.weight.copy_(block.gate.weight)
        stock.router.e_score_correction_bias.normal_(std=0.1)
        block.gate.e_score_correction_bias.copy_(stock.router.e_score_correction_bias)
        stock.experts.gate_up_proj.zero_()[:N] = block.experts.gate_up_proj
        stock.experts.down_proj.copy_(block.experts.down_proj)
    x_TD = make_input().float()
    torch.testing.assert_close(block(x_TD), stock(x_TD), rtol=1e-5, atol=1e-5)


# --- What reaches the gate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("normalize_over", "reached"), [("experts", False), ("selected", True), ("none", True)])
def test_only_weights_that_the_nulls_share_train_their_rows(normalize_over: str, reached: bool) -> None:
    block = make_block({"type": "null_experts", "top_k": 3, "num_null": 4, "normalize_over": normalize_over})
    block(make_input()).square().sum().backward()
    gradient_MD = block.gate.weight.grad
    assert bool(gradient_MD[N:].any()) == reached  # type: ignore[index]
    assert gradient_MD[:N].any()  # type: ignore[index]


def test_over_experts_the_logit_gradient_of_a_token_sums_to_zero_and_one_expert_gives_none() -> None:
    logits_TM = torch.randn(60, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    config = NullExpertsConfig(top_k=4, num_null=5)
    router = config.build(9, 4).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(9))
    routing = router(logits_TM)
    upstream_TK = torch.randn(60, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (gradient_TM,) = torch.autograd.grad(routing.weight_TK, logits_TM, upstream_TK)
    assert gradient_TM[:, :4].any()
    torch.testing.assert_close(gradient_TM.sum(-1), torch.zeros(60, dtype=torch.float64))
    alone_T = (routing.index_TK < 4).sum(-1) == 1
    assert alone_T.any()
    assert not gradient_TM[alone_T].any()


# --- The balance loss sets the load -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_experts", "num_null", "top_k", "target"),
    [(4, 5, 4, 1.778), (4, 7, 4, 1.455), (4, 9, 4, 1.231), (8, 8, 3, 1.5), (8, 16, 4, 1.333)],
)
def test_training_on_the_loss_alone_brings_the_load_to_kn_over_columns(
    num_experts: int, num_null: int, top_k: int, target: float
) -> None:
    """Section 3.3: the mean is steered, single tokens still differ. Starts above, the experts' logits being raised."""
    torch.manual_seed(0)
    x_TD = torch.randn(512, 32)
    router = NullExpertsConfig(top_k=top_k, num_null=num_null, linear_bias=True).build(32, num_experts)
    with torch.no_grad():
        router.weight.normal_(std=32**-0.5)
        router.bias[:num_experts] = 1.5  # type: ignore[index]
    optimizer = torch.optim.Adam(router.parameters(), lr=1e-2)
    loss = LoadBalancing(coefficient=1.0)
    before = LayerLoad.of(router(x_TD)).experts_per_token.item()
    for _ in range(300):
        value = loss.per_sequence(router(x_TD), RoutingContext()).sum()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    routing = router(x_TD)
    assert before > target + 0.5
    assert LayerLoad.of(routing).experts_per_token.item() == pytest.approx(target, abs=0.03)
    assert loss.per_sequence(routing, RoutingContext()).item() == pytest.approx(1.0, abs=5e-3)
    assert (routing.index_TK < num_experts).sum(-1).float().std() > 0.5


# --- Copied rows: the routing before is kept --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", range(1, 7))
def test_copied_rows_keep_the_routing_of_top_2(copies: int, dtype: torch.dtype) -> None:
    """Rows copied as in section 3.5, K = c + 2 and ties to the lower index: load exactly 2; with K = c + 1, exactly 1."""
    torch.manual_seed(copies)
    before = TopKConfig(top_k=2, normalize_top_k=True).build(16, 8).to(dtype)
    torch.nn.init.normal_(before.weight)
    x_TD = torch.randn(300, 16).to(dtype)
    expected = before(x_TD)

    def nulls(top_k: int) -> Routing:
        router = NullExpertsConfig(top_k=top_k, num_null=8 * copies, tie_margin=1e-6).build(16, 8).to(dtype)
        with torch.no_grad():
            router.weight.copy_(before.weight.repeat(1 + copies, 1))
        return router(x_TD)

    routing = nulls(copies + 2)
    kept_TK = routing.index_TK < 8
    assert (kept_TK.sum(-1) == 2).all()
    assert torch.equal(routing.index_TK[kept_TK].view(-1, 2), expected.index_TK)
    torch.testing.assert_close(routing.weight_TK[kept_TK].view(-1, 2), expected.weight_TK, rtol=1e-6, atol=1e-6)
    assert ((nulls(copies + 1).index_TK < 8).sum(-1) == 1).all()


# --- One token at a time, padding, config -----------------------------------------------------------------------------


def test_a_token_is_routed_alike_alone_and_in_any_order() -> None:
    block, x_TD = make_block({"type": "null_experts", "top_k": 3, "num_null": 4}), make_input(20)
    y_TD, order_T = block(x_TD), torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x_TD[order_T]), y_TD[order_T], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([block(x_D.unsqueeze(0)) for x_D in x_TD]), y_TD, rtol=1e-12, atol=1e-12)


def test_padding_counts_neither_as_load_nor_in_the_loss() -> None:
    block = make_block({"type": "null_experts", "top_k": 3, "num_null": 4})
    x_TD, padded, plain = make_input(20), RoutingContext(mask_T=torch.arange(20) < 12), RoutingContext()
    block(x_TD, padded)
    block(x_TD[:12], plain)
    masked, expected = LayerLoad.of(padded.records[0], padded.mask_T), LayerLoad.of(plain.records[0])
    assert torch.equal(masked.chosen_M, expected.chosen_M)
    assert masked.experts_per_token == expected.experts_per_token
    torch.testing.assert_close(balance(padded.records[0], padded), balance(plain.records[0], plain))


def test_no_tokens_and_no_coefficient_give_zero_that_can_be_differentiated() -> None:
    router = NullExpertsConfig(top_k=3, num_null=4).build(D, N)
    empty = LoadBalancing(coefficient=1.0).per_sequence(router(torch.zeros(0, D)), RoutingContext()).sum()
    off = 0.0 * LoadBalancing(coefficient=0.0).per_sequence(router(torch.ones(3, D)), RoutingContext()).sum()
    for value in (empty, off):
        assert value.item() == 0
        router.weight.grad = None
        value.backward()
        assert not copy.copy(router.weight.grad).any()  # type: ignore[union-attr]


def test_columns_and_names() -> None:
    config = NullExpertsConfig(top_k=3, num_null=4, linear_bias=True, selection_bias=True)
    router = config.build(D, N)
    assert isinstance(router, NullExpertsRouter)
    assert {name: tuple(tensor.shape) for name, tensor in router.state_dict().items()} == {
        "weight": (8, 6),
        "bias": (8,),
        "e_score_correction_bias": (8,),
    }
    assert (router.num_experts, router.top_k, router.picks) == (4, 3, 1.5)
    assert config.may_skip
    assert not NullExpertsConfig(top_k=3, num_null=0).may_skip
    assert config.unservable is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 7, "num_null": 2}, r"top_k = 7 is larger than num_experts \+ num_null \(6\); choose 1 to 6"),
        ({"top_k": 0, "num_null": 2}, "top_k = 0"),
        ({"top_k": 2}, "num_null = None is required"),
        ({"top_k": 2, "num_null": -1}, "num_null = -1"),
        ({"top_k": 2, "num_null": 2, "normalize_over": True}, "normalize_over = True is not one of the choices"),
        ({"top_k": 2, "num_null": 2, "null_output": "identity"}, "null_output = 'identity' needs weights"),
    ],
)
def test_what_can_not_work_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    values = {"experts": {"num_experts": N, "intermediate_size": 5}, "router": {"type": "null_experts", **fields}}
    with pytest.raises(ConfigError, match=f"moe.router.{message}"):
        MoESpec.from_dict(values, where="moe")
