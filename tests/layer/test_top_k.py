"""Top-k routing: worked numbers, an independent slow reference over all fields, parity with transformers, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from moesaic.errors import ConfigError
from moesaic.layer import LoadBalancing, MoEBlock, MoESpec, Routing, RoutingContext, TopKConfig, TopKRouter
from moesaic.layer.routers.scores import score


def route(logits: list[list[float]], *, selection_bias: list[float] | None = None, **fields: Any) -> Routing:
    """Route tokens whose logits are given: a router with identity weights, in float64."""
    logits_TN = torch.tensor(logits, dtype=torch.float64)
    config = TopKConfig.from_dict({**fields, "selection_bias": selection_bias is not None})
    router = identity_router(config, logits_TN.shape[1])
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias.copy_(torch.tensor(selection_bias))
    return router(logits_TN)


def identity_router(config: TopKConfig, num_experts: int) -> TopKRouter:
    router = config.build(num_experts, num_experts).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


def log(scores: list[list[float]]) -> list[list[float]]:
    """Logits whose softmax is `scores`."""
    return [[math.log(value) for value in row] for row in scores]


def logit(scores: list[list[float]]) -> list[list[float]]:
    """Logits whose sigmoid is `scores`."""
    return [[math.log(value / (1 - value)) for value in row] for row in scores]


def test_scores_that_underflow_have_a_finite_gradient() -> None:
    logits_TN = torch.tensor([[-200.0, 3.0, -104.0, 0.0]], requires_grad=True)
    score(logits_TN, "sqrt_softplus").sum().backward()
    assert logits_TN.grad is not None
    assert logits_TN.grad.isfinite().all()


# --- Worked numbers -------------------------------------------------------------------------------------------------


def test_softmax_weights_are_not_renormalised_by_default() -> None:
    """DeepSeekMoE, arXiv 2401.06066, eq. 9-11: routed gates sum to less than 1."""
    routing = route(log([[0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.1, 0.3], [0.35, 0.15, 0.45, 0.05]]), top_k=2)
    assert routing.index_TK.tolist() == [[0, 1], [1, 3], [2, 0]]
    expected_TK = torch.tensor([[0.4, 0.3], [0.5, 0.3], [0.45, 0.35]], dtype=torch.float64)
    torch.testing.assert_close(routing.weight_TK, expected_TK)
    torch.testing.assert_close(routing.weight_TK.sum(-1), torch.tensor([0.7, 0.8, 0.8], dtype=torch.float64))


@pytest.mark.parametrize(
    ("group_score", "experts", "weights"),
    [("max", [0, 3, 2], [0.30, 0.16, 0.05]), ("top2_sum", [0, 4, 5], [0.30, 0.15, 0.14])],
)
def test_group_score_decides_the_groups(group_score: str, experts: list[int], weights: list[float]) -> None:
    """DeepSeek-V2 takes a device's best expert, DeepSeek-V3 the sum of its two best."""
    scores = [[0.30, 0.02, 0.05, 0.16, 0.15, 0.14, 0.13, 0.05]]
    routing = route(log(scores), top_k=3, num_groups=4, top_k_groups=2, group_score=group_score)
    assert routing.index_TK.tolist() == [experts]
    torch.testing.assert_close(routing.weight_TK, torch.tensor([weights], dtype=torch.float64))


DEEPSEEK_V3: dict[str, Any] = {
    "score_function": "sigmoid",
    "normalize_top_k": True,
    "normalization_epsilon": 1e-20,
    "scaling_factor": 2.5,
    "num_groups": 4,
    "top_k_groups": 2,
    "group_score": "top2_sum",
}
V3_LOGITS = [[2, 1, -1, 0, -2, -3, 0.5, -0.5]]
V3_BIAS = [-1.2, -1.3, -0.2, -0.6, 0.1, 0.1, -0.7, -0.5]


@pytest.mark.parametrize(
    ("top_k", "experts", "weights"),
    [(4, [4, 5, 2, 3], [0.318530, 0.126730, 0.718656, 1.336084]), (3, [4, 5, 2], [0.684177, 0.272206, 1.543617])],
)
def test_deepseek_v3_gate(top_k: int, experts: list[int], weights: list[float]) -> None:
    """Bias in the choice but not in the weights; weights sum to the scaling factor."""
    routing = route(V3_LOGITS, selection_bias=V3_BIAS, top_k=top_k, **DEEPSEEK_V3)
    assert routing.index_TK.tolist() == [experts]
    torch.testing.assert_close(routing.weight_TK, torch.tensor([weights], dtype=torch.float64), rtol=0, atol=1e-6)
    assert routing.weight_TK.sum().item() == pytest.approx(2.5)
    choice = [-0.319203, -0.568941, 0.068941, -0.1, 0.219203, 0.147426, -0.077541, -0.122459]
    kept = [-math.inf, -math.inf, *choice[2:6], -math.inf, -math.inf]
    expected_TN = torch.tensor([kept], dtype=torch.float64)
    torch.testing.assert_close(routing.selection_TN, expected_TN, rtol=0, atol=1e-6)


def test_zero_mask_lets_a_masked_expert_win() -> None:
    """What older implementations do: expert 0, outside the groups, compares with 0 and beats expert 3 at -0.1."""
    routing = route(V3_LOGITS, selection_bias=V3_BIAS, top_k=4, group_mask_value="zero", **DEEPSEEK_V3)
    assert routing.index_TK.tolist() == [[4, 5, 2, 0]]


def test_all_groups_allowed_equals_no_group_limit() -> None:
    limited = route(V3_LOGITS, selection_bias=V3_BIAS, top_k=3, **{**DEEPSEEK_V3, "top_k_groups": 4})
    free = route(
        V3_LOGITS, selection_bias=V3_BIAS, top_k=3, **{**DEEPSEEK_V3, "top_k_groups": None, "num_groups": None}
    )
    assert torch.equal(limited.index_TK, free.index_TK)
    assert torch.equal(limited.weight_TK, free.weight_TK)


def test_equal_scores_go_to_the_lower_index() -> None:
    assert route([[1, 1, 1, 1], [0, 2, 2, 2]], top_k=2).index_TK.tolist() == [[0, 1], [1, 2]]
    grouped = route([[1.0] * 8], top_k=3, num_groups=4, top_k_groups=2, group_score="top2_sum")
    assert grouped.index_TK.tolist() == [[0, 1, 2]]


def test_all_experts_picked_is_a_dense_mixture() -> None:
    routing = route(log([[0.2, 0.5, 0.3]]), top_k=3)
    assert sorted(routing.index_TK[0].tolist()) == [0, 1, 2]
    assert routing.weight_TK.sum().item() == pytest.approx(1.0)


def test_selection_bias_on_logits_or_on_scores() -> None:
    """Sigmoids 0.8, 0.75, 0.5: a bias of 0.1 reorders the scores, but not the logits 1.386, 1.099, 0."""
    rows, bias = logit([[0.8, 0.75, 0.5]]), [0.0, 0.1, 0.0]
    by_score = route(rows, selection_bias=bias, top_k=1, score_function="sigmoid")
    by_logit = route(rows, selection_bias=bias, top_k=1, score_function="sigmoid", select_by="logits")
    assert (by_score.index_TK.item(), by_score.weight_TK.item()) == (1, pytest.approx(0.75))
    assert (by_logit.index_TK.item(), by_logit.weight_TK.item()) == (0, pytest.approx(0.8))
    assert by_logit.selection_TN.tolist() == [pytest.approx([math.log(4), math.log(3) + 0.1, 0.0])]


def test_logits_order_experts_whose_scores_saturate() -> None:
    rows = [[40.0, 50.0, 0.0, 60.0]]
    assert route(rows, top_k=2, score_function="sigmoid").index_TK.tolist() == [[0, 1]]
    assert route(rows, top_k=2, score_function="sigmoid", select_by="logits").index_TK.tolist() == [[3, 1]]


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({"normalization_order": 2.0}, [0.8, 0.6]),
        ({"normalization_order": 0.5}, [0.4 / (0.4**0.5 + 0.3**0.5) ** 2, 0.3 / (0.4**0.5 + 0.3**0.5) ** 2]),
        ({"normalization_floor": 0.8}, [0.5, 0.375]),
        ({"normalization_floor": 0.6}, [4 / 7, 3 / 7]),
        ({"normalization_floor": 0.8, "normalization_epsilon": 0.2}, [0.4, 0.3]),
        ({"normalization_order": 2.0, "scaling_factor": 3.0}, [2.4, 1.8]),
    ],
)
def test_normalisation_by_other_norms(fields: dict[str, Any], weights: list[float]) -> None:
    """Scores 0.4 and 0.3: their sum is 0.7, their Euclidean norm 0.5."""
    routing = route(log([[0.4, 0.3, 0.2, 0.1]]), top_k=2, normalize_top_k=True, **fields)
    torch.testing.assert_close(routing.weight_TK, torch.tensor([weights], dtype=torch.float64))


def test_logits_are_scaled_then_bounded() -> None:
    routing = route([[3.0, -1.0, 0.5]], top_k=1, score_function="sigmoid", logit_scale=2.0, logit_softcap=4.0)
    expected = [4 * math.tanh(value / 4) for value in (6.0, -2.0, 1.0)]
    assert routing.logits_TN.tolist() == [pytest.approx(expected)]
    assert routing.weight_TK.item() == pytest.approx(1 / (1 + math.exp(-expected[0])))


def test_input_is_normalised_and_scaled_and_weights_scaled_by_expert() -> None:
    """Gemma 4: the input 3, 4, 0 has a mean square of 25 / 3; the learned vectors are 1 at first."""
    fields = {"top_k": 2, "input_norm": True, "input_norm_epsilon": 2 / 3, "input_scale": True, "expert_scale": True}
    router = identity_router(TopKConfig.from_dict(fields), 3)
    x_TD = torch.tensor([[3.0, 4.0, 0.0]], dtype=torch.float64)
    assert router(x_TD).logits_TN.tolist() == [pytest.approx([1.0, 4 / 3, 0.0])]
    assert router.scale is not None
    assert router.per_expert_scale is not None
    assert {name for name, _ in router.named_parameters()} == {"weight", "scale", "per_expert_scale"}
    with torch.no_grad():
        router.scale.copy_(torch.tensor([2.0, -3.0, 1.0]))
        router.per_expert_scale.copy_(torch.tensor([0.5, 7.0, -2.0]))
    routing = router(x_TD)
    logits = [2.0, -4.0, 0.0]
    scores = reference_scores(logits, "softmax")
    assert routing.logits_TN.tolist() == [pytest.approx(logits)]
    assert routing.index_TK.tolist() == [[0, 2]]
    assert routing.weight_TK.tolist() == [pytest.approx([0.5 * scores[0], -2.0 * scores[2]])]


def test_switch_takes_one_expert_and_scales_it_by_its_probability() -> None:
    """Switch Transformers, arXiv 2101.03961, eq. 2 and 4: y = p_i f_i(x); uniform routing costs 1, collapse up to N."""
    scores = [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.1, 0.6], [0.2, 0.5, 0.2, 0.1], [0.1, 0.2, 0.6, 0.1]]
    routing = route(log(scores), top_k=1)
    assert routing.index_TK.tolist() == [[0], [3], [1], [2]]
    torch.testing.assert_close(routing.weight_TK.flatten(), torch.tensor([0.4, 0.6, 0.5, 0.6], dtype=torch.float64))
    loss = LoadBalancing(coefficient=1.0)
    # Every expert takes a quarter of the tokens, so f = 1 for all and the loss is the sum of the mean scores.
    assert loss.per_sequence(routing, RoutingContext()).item() == pytest.approx(1.0)
    # All tokens to expert 0: f = (4, 0, 0, 0), P_0 = 0.4.
    collapsed = route(log([scores[0]] * 4), top_k=1)
    assert loss.per_sequence(collapsed, RoutingContext()).item() == pytest.approx(1.6)


def test_experts_get_the_input_without_the_jitter_of_their_router() -> None:
    spec = {"experts": {"num_experts": 4, "intermediate_size": 3}, "router": {"top_k": 4, "input_jitter": 0.5}}
    torch.manual_seed(0)
    block, x_TD = MoEBlock(MoESpec.from_dict(spec), 6).double().train(), torch.randn(5, 6, dtype=torch.float64)
    context = RoutingContext(seed=torch.tensor(3))
    routing = block.gate(x_TD, context)
    assert not torch.allclose(routing.logits_TN, x_TD @ block.gate.get_parameter("weight").T)
    torch.testing.assert_close(block(x_TD, context), block.experts(x_TD, routing.index_TK, routing.weight_TK))


def test_input_jitter_multiplies_the_input_in_training_only() -> None:
    """Every factor is within 1 +- 0.25, they spread evenly over that range, and the seed decides them."""
    router = identity_router(TopKConfig(top_k=1, input_jitter=0.25), 64).train()
    x_TD = torch.full((200, 64), 2.0, dtype=torch.float64)
    factors_TN = router(x_TD, RoutingContext(seed=torch.tensor(1))).logits_TN / 2.0
    assert 0.75 <= factors_TN.min() < 0.76
    assert 1.24 < factors_TN.max() <= 1.25
    assert factors_TN.mean().item() == pytest.approx(1.0, abs=0.005)
    assert factors_TN.std().item() == pytest.approx(0.25 / math.sqrt(3), rel=0.02)
    assert torch.equal(x_TD, torch.full_like(x_TD, 2.0))  # the experts' input is left alone
    assert not torch.equal(router(x_TD, RoutingContext(seed=torch.tensor(2))).logits_TN / 2.0, factors_TN)
    for layer in (1, 47):
        router.layer = layer
        assert not torch.equal(router(x_TD, RoutingContext(seed=torch.tensor(1))).logits_TN / 2.0, factors_TN)
    assert torch.equal(router.eval()(x_TD).logits_TN, x_TD)


# --- A slow reference, written from the field descriptions in plain floats -------------------------------------------


def reference_scores(logits: list[float], function: str) -> list[float]:
    if function == "sigmoid":
        return [1 / (1 + math.exp(-value)) for value in logits]
    if function == "sqrt_softplus":
        return [math.sqrt(math.log1p(math.exp(value))) for value in logits]
    exponentials = [math.exp(value - max(logits)) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def reference_route(logits: list[float], bias: list[float], fields: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Picks and weights of one token."""
    logits = [value * fields["logit_scale"] for value in logits]
    if fields["logit_softcap"]:
        logits = [fields["logit_softcap"] * math.tanh(value / fields["logit_softcap"]) for value in logits]
    scores = reference_scores(logits, fields["score_function"])
    compared = logits if fields["select_by"] == "logits" else scores
    choice = [value + shift for value, shift in zip(compared, bias, strict=True)]
    if fields["num_groups"]:
        size = len(choice) // fields["num_groups"]
        best = 1 if fields["group_score"] == "max" else 2
        totals = [
            sum(sorted(choice[start : start + size], reverse=True)[:best]) for start in range(0, len(choice), size)
        ]
        allowed = sorted(range(len(totals)), key=lambda group: -totals[group])[: fields["top_k_groups"]]
        masked = -math.inf if fields["group_mask_value"] == "-inf" else 0.0
        choice = [value if expert // size in allowed else masked for expert, value in enumerate(choice)]
    picks = sorted(range(len(choice)), key=lambda expert: -choice[expert])[: fields["top_k"]]
    if fields["softmax_over"] == "selected":
        weights = reference_scores([logits[expert] for expert in picks], "softmax")
    else:
        weights = [scores[expert] for expert in picks]
    if fields["normalize_top_k"]:
        order = fields["normalization_order"]
        total = sum(value**order for value in weights) ** (1 / order)
        total = max(total, fields["normalization_floor"]) + fields["normalization_epsilon"]
        weights = [value / total for value in weights]
    return picks, [value * fields["scaling_factor"] for value in weights]


@st.composite
def routing_cases(draw: st.DrawFn) -> tuple[dict[str, Any], list[list[float]], list[float] | None]:
    """Any valid configuration, logits on a grid coarse enough to tie, and a selection bias or none."""
    group_size = draw(st.integers(2, 4))
    num_groups = draw(st.integers(1, 4))
    num_experts = group_size * num_groups
    grouped = draw(st.booleans())
    top_k_groups = draw(st.integers(1, num_groups))
    score_function = draw(st.sampled_from(["softmax", "sigmoid", "sqrt_softplus"]))
    normalize = draw(st.booleans())
    fields = {
        "top_k": draw(st.integers(1, top_k_groups * group_size if grouped else num_experts)),
        "score_function": score_function,
        "softmax_over": draw(st.sampled_from(["all", "selected"])) if score_function == "softmax" else "all",
        "normalize_top_k": normalize,
        "normalization_order": draw(st.sampled_from([1.0, 2.0, 3.0])) if normalize else 1.0,
        "normalization_floor": draw(st.sampled_from([0.0, 0.8])) if normalize else 0.0,
        "normalization_epsilon": draw(st.sampled_from([0.0, 1e-20, 0.25])),
        "scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "select_by": draw(st.sampled_from(["scores", "logits"])),
        "logit_scale": draw(st.sampled_from([1.0, 0.5])),
        "logit_softcap": draw(st.sampled_from([None, 2.0])),
        "num_groups": num_groups if grouped else None,
        "top_k_groups": top_k_groups if grouped else None,
        "group_score": draw(st.sampled_from(["max", "top2_sum"])),
        "group_mask_value": draw(st.sampled_from(["-inf", "zero"])),
    }
    # A grid of halves ties often, and unequal scores stay further apart than float64 rounds.
    grid = st.integers(-6, 6).map(lambda step: step / 2)
    row = st.lists(grid, min_size=num_experts, max_size=num_experts)
    logits = draw(st.lists(row, min_size=1, max_size=3))
    return fields, logits, draw(st.none() | row)


@given(routing_cases())
@settings(deadline=None, max_examples=300)
def test_router_equals_the_slow_reference(
    case: tuple[dict[str, Any], list[list[float]], list[float] | None],
) -> None:
    fields, logits, bias = case
    routing = route(logits, selection_bias=bias, **fields)
    for token, row in enumerate(logits):
        picks, weights = reference_route(row, bias or [0.0] * len(row), fields)
        if near_tie(row, bias, fields):
            continue
        assert routing.index_TK[token].tolist() == picks
        assert routing.weight_TK[token].tolist() == pytest.approx(weights, rel=1e-12)


def near_tie(logits: list[float], bias: list[float] | None, fields: dict[str, Any]) -> bool:
    """Whether rounding alone decides: two sums of unequal parts that agree to 1e-12, experts or groups."""
    logits = [value * fields["logit_scale"] for value in logits]
    if fields["logit_softcap"]:
        logits = [fields["logit_softcap"] * math.tanh(value / fields["logit_softcap"]) for value in logits]
    scores = logits if fields["select_by"] == "logits" else reference_scores(logits, fields["score_function"])
    parts = list(zip(scores, bias or [0.0] * len(scores), strict=True))
    if any(one != two and abs(sum(one) - sum(two)) < 1e-12 for one in parts for two in parts):
        return True
    if not fields["num_groups"] or fields["group_score"] == "max":
        return False
    choice = [sum(part) for part in parts]
    size = len(choice) // fields["num_groups"]
    best = [sorted(choice[start : start + size], reverse=True)[:2] for start in range(0, len(choice), size)]
    return any(one != two and abs(sum(one) - sum(two)) < 1e-12 for one in best for two in best)


# --- Gradients and precision ----------------------------------------------------------------------------------------


def test_softmax_over_selected_equals_renormalised_softmax_over_all() -> None:
    logits_TN = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    upstream_TK = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for config in (TopKConfig(top_k=3, softmax_over="selected"), TopKConfig(top_k=3, normalize_top_k=True)):
        router = identity_router(config, 8)
        x_TD = logits_TN.clone().requires_grad_()
        routing = router(x_TD)
        gradients = torch.autograd.grad(routing.weight_TK, [x_TD, router.weight], upstream_TK)
        results.append((routing.index_TK, routing.weight_TK, *gradients))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def make_router(**fields: Any) -> TopKRouter:
    torch.manual_seed(0)
    return TopKConfig(top_k=2, **fields).build(6, 4)


def test_gradient_reaches_weight_and_linear_bias_but_not_the_selection_bias() -> None:
    router = make_router(linear_bias=True, selection_bias=True)
    bias = router.e_score_correction_bias
    assert bias is not None
    assert {name for name, _ in router.named_parameters()} == {"weight", "bias"}
    assert set(router.state_dict()) == {"weight", "bias", "e_score_correction_bias"}
    router(torch.randn(5, 6)).weight_TK.square().sum().backward()
    assert router.weight.grad is not None
    assert router.bias is not None
    assert router.bias.grad is not None
    assert router.weight.grad.abs().sum() > 0
    assert router.bias.grad.abs().sum() > 0
    assert not bias.requires_grad
    assert bias.grad is None


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.bfloat16(),
        lambda module: module.half(),
        lambda module: module.double(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
        lambda module: nn.Sequential(module).to(torch.bfloat16)[0],
    ],
)
def test_selection_bias_is_not_rounded_when_the_module_is_cast(cast: Any) -> None:
    router = make_router(selection_bias=True)
    bias_N = torch.tensor([0.1, 1 / 3, 5.001, -0.7])
    assert router.e_score_correction_bias is not None
    router.e_score_correction_bias.copy_(bias_N)
    router = cast(router)
    assert router.weight.dtype != torch.float32
    assert router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, bias_N)
    assert torch.equal(router.state_dict()["e_score_correction_bias"], bias_N)


def test_selection_bias_moves_between_devices_with_the_module() -> None:
    router = make_router(selection_bias=True).to("meta", torch.bfloat16)
    assert router.e_score_correction_bias is not None
    assert router.e_score_correction_bias.device.type == "meta"
    assert router.e_score_correction_bias.dtype == torch.float32
    empty = router.to_empty(device="cpu")
    assert empty.e_score_correction_bias is not None
    assert empty.e_score_correction_bias.device.type == "cpu"


@pytest.mark.parametrize("fields", [{}, {"softmax_over": "selected"}, {"score_function": "sigmoid"}])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_routes_in_float32_at_least(
    fields: dict[str, Any], dtype: torch.dtype, expected: torch.dtype, autocast: bool
) -> None:
    router = make_router(**fields).to(dtype)
    x_TD = torch.randn(50, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing = router(x_TD)
    for tensor in (routing.logits_TN, routing.scores_TN, routing.selection_TN, routing.weight_TK):
        assert tensor.dtype == expected
    exact_TN = x_TD.double() @ router.weight.double().T
    tolerance = 1e-12 if expected == torch.float64 else 1e-6
    torch.testing.assert_close(routing.logits_TN.double(), exact_TN, rtol=tolerance, atol=tolerance)


def test_unstable_ties_still_pick_the_best() -> None:
    logits = [[0.1, 0.9, 0.5, 0.3], [2.0, 1.0, 4.0, 3.0]]
    fast = route(logits, top_k=2, stable_ties=False)
    stable = route(logits, top_k=2)
    assert torch.equal(fast.index_TK, stable.index_TK)
    assert torch.equal(fast.weight_TK, stable.weight_TK)


def test_initialisation_has_the_asked_spread_and_zero_biases() -> None:
    router = TopKConfig(top_k=2, linear_bias=True, selection_bias=True).build(256, 64)
    router.reset_parameters(std=0.006)
    assert router.weight.std().item() == pytest.approx(0.006, rel=0.05)
    for bias in (router.bias, router.e_score_correction_bias):
        assert bias is not None
        assert not bias.any()
    assert "num_experts=64, top_k=2, score_function=softmax" in repr(router)


# --- Parity with transformers ---------------------------------------------------------------------------------------


def assert_same_routing(routing: Routing, index_TK: Tensor, weight_TK: Tensor, *, atol: float = 1e-6) -> None:
    """The stock routers leave the order of picks open, so compare the weights by expert."""
    mine_TN = torch.zeros(routing.logits_TN.shape).scatter(1, routing.index_TK, routing.weight_TK.detach())
    stock_TN = torch.zeros(routing.logits_TN.shape).scatter(1, index_TK, weight_TK.detach())
    torch.testing.assert_close(mine_TN, stock_TN, rtol=0, atol=atol)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_parity_with_deepseek_v2(method: str) -> None:
    grouped = {"num_groups": 4, "top_k_groups": 2} if method == "group_limited_greedy" else {}
    config = DeepseekV2Config(
        hidden_size=16,
        num_attention_heads=4,
        n_routed_experts=16,
        num_experts_per_tok=4,
        topk_method=method,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=16.0,
    )
    stock = DeepseekV2TopkRouter(config)
    router = TopKConfig(top_k=4, scaling_factor=16.0, **grouped).build(16, 16)
    nn.init.normal_(stock.weight, generator=torch.Generator().manual_seed(0))
    router.load_state_dict(stock.state_dict())
    x_TD = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    logits_TN, weight_TK, index_TK = stock(x_TD)
    routing = router(x_TD)
    torch.testing.assert_close(routing.logits_TN, logits_TN, rtol=0, atol=2e-6)
    assert_same_routing(routing, index_TK, weight_TK, atol=1e-5)  # scores times 16


@pytest.mark.parametrize("normalize", [True, False])
def test_parity_with_deepseek_v3(normalize: bool) -> None:
    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, norm_topk_prob=normalize
    )
    stock = DeepseekV3TopkRouter(config)
    fields = {**DEEPSEEK_V3, "normalize_top_k": normalize, "selection_bias": True}
    router = TopKConfig(top_k=4, **fields).build(16, 16)
    nn.init.normal_(stock.weight, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(stock.e_score_correction_bias, generator=torch.Generator().manual_seed(2))
    router.load_state_dict(stock.state_dict())
    x_TD = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits_TN, weight_TK, index_TK = stock(x_TD)
    routing = router(x_TD)
    torch.testing.assert_close(routing.logits_TN, logits_TN, rtol=0, atol=2e-6)
    assert_same_routing(routing, index_TK, weight_TK)


# --- Refusals -------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no picks": ({"top_k": 0}, r"top_k = 0 is not valid; input should be greater than 0"),
    "too many picks": ({"top_k": 9}, r"top_k = 9 is larger than num_experts \(8\); choose 1 to 8"),
    "unknown score function": (
        {"top_k": 2, "score_function": "relu"},
        r"score_function = 'relu' is not one of the choices; choose one of 'softmax', 'sigmoid' or 'sqrt_softplus'",
    ),
    "selected without softmax": (
        {"top_k": 2, "softmax_over": "selected", "score_function": "sigmoid"},
        r"softmax_over = 'selected' needs softmax scores, not sigmoid; leave it at `all`",
    ),
    "negative epsilon": (
        {"top_k": 2, "normalization_epsilon": -1e-9},
        r"normalization_epsilon = -1e-09 is not valid; input should be greater than or equal to 0",
    ),
    "groups alone": (
        {"top_k": 2, "num_groups": 2},
        r"top_k_groups = None is missing: num_groups and top_k_groups go together; set both or neither",
    ),
    "picked groups alone": (
        {"top_k": 2, "top_k_groups": 2},
        r"num_groups = None is missing: num_groups and top_k_groups go together; set both or neither",
    ),
    "more picked groups than groups": (
        {"top_k": 2, "num_groups": 2, "top_k_groups": 3},
        r"top_k_groups = 3 is larger than num_groups; choose 1 to 2",
    ),
    "groups that do not divide": (
        {"top_k": 2, "num_groups": 3, "top_k_groups": 2},
        r"num_groups = 3 does not divide num_experts \(8\); choose from \[1, 2, 4, 8\]",
    ),
    "groups of one for top2_sum": (
        {"top_k": 2, "num_groups": 8, "top_k_groups": 2, "group_score": "top2_sum"},
        r"num_groups = 8 leaves one expert a group, too few for top2_sum; use group_score: max",
    ),
    "groups too small": (
        {"top_k": 5, "num_groups": 4, "top_k_groups": 2},
        r"top_k_groups = 2 groups of 2 hold fewer than top_k \(5\) experts; choose 3 to 4",
    ),
    "norm of weights that are left alone": (
        {"top_k": 2, "normalization_order": 2.0},
        r"normalization_order = 2.0 has no effect without normalize_top_k; set normalize_top_k: true",
    ),
    "floor of weights that are left alone": (
        {"top_k": 2, "normalization_floor": 1e-12},
        r"normalization_floor = 1e-12 has no effect without normalize_top_k",
    ),
    "order zero": ({"top_k": 2, "normalize_top_k": True, "normalization_order": 0}, r"normalization_order = 0 is not"),
    "bound of zero": ({"top_k": 2, "logit_softcap": 0.0}, r"logit_softcap = 0.0 is not valid; .* greater than 0"),
    "logits without scale": ({"top_k": 2, "logit_scale": 0.0}, r"logit_scale = 0.0 is not valid"),
    "jitter that may turn signs": (
        {"top_k": 2, "input_jitter": 1.0},
        r"input_jitter = 1.0 is not valid; .* less than 1",
    ),
    "selection by weights": ({"top_k": 2, "select_by": "weights"}, r"select_by = 'weights' is not one of the choices"),
    "unknown key": ({"top_k": 2, "normalise_top_k": True}, r"normalise_top_k = True .* did you mean 'normalize_top_k'"),
    "scale that is not a number": ({"top_k": 2, "scaling_factor": math.nan}, r"scaling_factor = nan is not valid"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_configuration_is_refused_by_name(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ConfigError, match=f"^{message}"):
        TopKConfig.from_dict(fields).build(4, 8)
