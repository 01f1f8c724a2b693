"""Expert choice: worked numbers, a slow reference, exact loads, the capped plan, and the causal rule of evaluation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import ExpertChoiceConfig, ExpertChoiceRouter, LayerLoad, LoadBalancing, Routing, RoutingContext
from moesaic.layer.routers.parts.plans import capped_plan
from moesaic.layer.routers.parts.sequences import take


def make_router(num_experts: int, *, training: bool = True, **fields: Any) -> ExpertChoiceRouter:
    """A router with identity weights, in float64: its input is its logits."""
    router = ExpertChoiceConfig.from_dict(fields).build(num_experts, num_experts).double().train(training)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


def dense(routing: Routing) -> Tensor:
    """Weights by expert, (T, N)."""
    weight_TN = routing.weight_TK.new_zeros(routing.index_TK.shape[0], routing.num_experts + 1)
    return weight_TN.scatter(1, routing.index_TK, routing.weight_TK)[:, :-1]


def log(scores: list[list[float]]) -> Tensor:
    return torch.tensor(scores, dtype=torch.float64).log()


# --- Worked numbers ---------------------------------------------------------------------------------------------------


def test_experts_take_the_tokens_with_their_largest_scores() -> None:
    """T = 4, N = 2, c = 1: each expert takes 2 tokens; token 1 has two experts and token 2 none (2202.09368, 3.2)."""
    scores = [[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.7, 0.3]]
    scores[1] = [0.75, 0.45]  # sigmoid scores need not sum to 1
    logits_TN = torch.tensor(scores, dtype=torch.float64).logit()
    routing = make_router(2, capacity_factor=1.0, score_function="sigmoid")(logits_TN)
    assert routing.index_TK.tolist() == [[0, 2], [0, 1], [1, 2], [2, 2]]
    expected_TN = torch.tensor([[0.9, 0], [0.75, 0.45], [0, 0.35], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(dense(routing), expected_TN)


def test_scores_are_a_softmax_over_experts_and_are_not_normalised_again() -> None:
    routing = make_router(2, capacity_factor=1.0)(log([[0.8, 0.2], [0.7, 0.3], [0.4, 0.6], [0.1, 0.9]]))
    torch.testing.assert_close(
        dense(routing), torch.tensor([[0.8, 0], [0.7, 0], [0, 0.6], [0, 0.9]], dtype=torch.float64)
    )


def test_ties_go_to_the_earlier_token() -> None:
    routing = make_router(2, capacity_factor=1.0)(torch.zeros(4, 2, dtype=torch.float64))
    assert routing.index_TK.tolist() == [[0, 1], [0, 1], [2, 2], [2, 2]]


@pytest.mark.parametrize(
    ("rounding", "minimum", "expected"),
    [("ceil", 0, [0, 1, 2, 4]), ("floor", 0, [0, 0, 1, 4]), ("nearest", 0, [0, 0, 2, 4]), ("floor", 3, [0, 1, 3, 4])],
)
def test_capacity_is_rounded_and_bounded(rounding: str, minimum: int, expected: list[int]) -> None:
    """T c / N = 0, 0.4, 1.6 and 4 for 0, 1, 4 and 10 tokens with c = 3.2 and N = 8."""
    config = ExpertChoiceConfig.from_dict(
        {"capacity_factor": 3.2, "rounding": rounding, "minimum_capacity": minimum, "evaluation_capacity_factor": 8.0}
    )
    tokens_G = torch.tensor([0, 1, 4, 10])
    assert config.capacity(tokens_G, 8, training=True).tolist() == expected
    assert config.capacity(tokens_G, 8, training=False).tolist() == [0, 1, 4, 10]


def test_whole_capacities_are_not_rounded_up() -> None:
    assert 50 * 1.1 / 11 > 5  # in floating point
    assert ExpertChoiceConfig(capacity_factor=1.1).capacity(torch.tensor([50]), 11, training=True).tolist() == [5]


# --- A slow reference -------------------------------------------------------------------------------------------------


def reference_picks(scores: list[list[float]], mask: list[bool], capacity: int) -> list[set[int]]:
    """Experts of each token of one group."""
    picks: list[set[int]] = [set() for _ in scores]
    for expert in range(len(scores[0])):
        real = [token for token in range(len(scores)) if mask[token]]
        for token in sorted(real, key=lambda token: -scores[token][expert])[:capacity]:
            picks[token].add(expert)
    return picks


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], list[list[list[float]]], list[list[bool]]]:
    """Fields, logits (B, L, N) on a grid coarse enough to tie, and a mask."""
    num_experts, batch, length = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    fields = {
        "capacity_factor": draw(st.integers(1, 2 * num_experts)) / 2,
        "minimum_capacity": draw(st.integers(0, 2)),
        "rounding": draw(st.sampled_from(["ceil", "floor", "nearest"])),
        "scope": draw(st.sampled_from(["sequence", "batch"])),
        "score_function": "sigmoid",
    }
    grid = st.integers(-3, 3).map(float)
    row = st.lists(grid, min_size=num_experts, max_size=num_experts)
    logits = draw(st.lists(st.lists(row, min_size=length, max_size=length), min_size=batch, max_size=batch))
    mask = st.lists(st.booleans(), min_size=length, max_size=length)
    return fields, logits, draw(st.lists(mask, min_size=batch, max_size=batch))


@given(cases())
@settings(deadline=None, max_examples=200)
def test_router_equals_the_slow_reference(
    case: tuple[dict[str, Any], list[list[list[float]]], list[list[bool]]],
) -> None:
    fields, logits, mask = case
    groups = list(zip(logits, mask, strict=True))
    if fields["scope"] == "batch":
        groups = [([row for rows in logits for row in rows], [real for reals in mask for real in reals])]
    x_BLN = torch.tensor(logits, dtype=torch.float64)
    context = RoutingContext(batch_size=len(logits), mask_T=torch.tensor(mask).flatten())
    router = make_router(x_BLN.shape[-1], **fields)
    routing = router(x_BLN.flatten(0, 1), context)
    expected: list[set[int]] = []
    for rows, reals in groups:
        exact = sum(reals) * fields["capacity_factor"] / x_BLN.shape[-1]
        rounded = {"ceil": math.ceil(exact), "floor": math.floor(exact), "nearest": math.floor(exact + 0.5)}
        capacity = max(rounded[fields["rounding"]], fields["minimum_capacity"])
        expected += reference_picks(rows, reals, capacity)
    actual = [{expert for expert in picks if expert < x_BLN.shape[-1]} for picks in routing.index_TK.tolist()]
    assert actual == expected
    assert routing.top_k == max(1, *map(len, expected))
    scores_TN = x_BLN.flatten(0, 1).sigmoid()
    for token, experts in enumerate(expected):
        for expert in range(x_BLN.shape[-1]):
            weight = scores_TN[token, expert] if expert in experts else 0.0
            assert dense(routing)[token, expert] == weight


@pytest.mark.parametrize("fields", [{}, {"scope": "batch"}, {"max_experts_per_token": 2}, {"capacity_factor": 1.25}])
@pytest.mark.parametrize("skew", [0.0, 20.0])
def test_every_expert_has_the_same_load_however_skewed_the_scores(fields: dict[str, Any], skew: float) -> None:
    x_BLN = torch.randn(3, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_BLN[..., 0] += skew
    router = make_router(4, **fields)
    routing = router(x_BLN.flatten(0, 1), RoutingContext(batch_size=3))
    capacity = 24 * router.config.capacity_factor / 4
    if router.config.scope == "sequence":
        capacity = 3 * math.ceil(capacity / 3)
    load = LayerLoad.of(routing)
    assert load.load_N.tolist() == [capacity] * 4
    assert router.picks == pytest.approx(router.config.capacity_factor)
    loss_B = LoadBalancing(coefficient=1.0, scope="batch").per_sequence(routing, RoutingContext(batch_size=3))
    torch.testing.assert_close(loss_B, torch.ones(3, dtype=torch.float64))


def test_gradient_of_the_weights_is_that_of_the_scores() -> None:
    router = make_router(4)
    x_TN = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    # The picks stay the same for small changes.
    assert torch.autograd.gradcheck(lambda x_TN: router(x_TN).weight_TK, x_TN)


# --- The plan under a limit on a token's experts ----------------------------------------------------------------------


def test_capped_plan_is_the_best_assignment_under_both_limits() -> None:
    """With little entropy and many rounds, against a linear program whose vertices are all zeros and ones."""
    optimize = pytest.importorskip("scipy.optimize")
    length, experts, capacity, cap = 16, 8, 4, 3
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        scores_LN = torch.randn(length, experts, dtype=torch.float64, generator=generator).softmax(-1)
        mask_GL = torch.ones(1, length, dtype=torch.bool)
        capacity_G = torch.tensor([capacity])
        plan_GLN = capped_plan(scores_LN[None], mask_GL, capacity_G, cap, entropy=1e-3, iterations=1000)
        picked_LN = take(plan_GLN, mask_GL, capacity_G)[0]
        token_rows = torch.eye(length).repeat_interleave(experts, dim=1)
        expert_rows = torch.eye(experts).repeat(1, length)
        best = optimize.linprog(
            -scores_LN.flatten().numpy(),
            A_ub=token_rows.numpy(),
            b_ub=[cap] * length,
            A_eq=expert_rows.numpy(),
            b_eq=[capacity] * experts,
            bounds=(0, 1),
        )
        expected_LN = torch.tensor(best.x).view(length, experts) > 0.5
        assert torch.equal(picked_LN, expected_LN)
        assert int(picked_LN.sum(-1).max()) <= cap


def test_capped_plan_keeps_its_limits_and_leaves_padding_out() -> None:
    scores_GLN = torch.randn(2, 12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    mask_GL = torch.ones(2, 12, dtype=torch.bool)
    mask_GL[1, 8:] = False
    plan_GLN = capped_plan(scores_GLN, mask_GL, torch.tensor([6, 4]), 3, entropy=0.05, iterations=500).exp()
    torch.testing.assert_close(plan_GLN[0].sum(0), torch.full((4,), 6.0, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(plan_GLN[1].sum(0), torch.full((4,), 4.0, dtype=torch.float64), rtol=1e-6, atol=0)
    assert plan_GLN.sum(-1).max() <= 3 + 1e-4
    assert plan_GLN.max() <= 1 + 1e-9
    assert not plan_GLN[1, 8:].any()
    alone = capped_plan(scores_GLN[1:, :8], mask_GL[1:, :8], torch.tensor([4]), 3, entropy=0.05, iterations=500).exp()
    torch.testing.assert_close(plan_GLN[1:, :8], alone)


def test_limit_spreads_what_popular_tokens_would_take() -> None:
    """Tokens 0-3 have all large scores: without the limit they get all four experts, and the others none."""
    x_TN = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1
    x_TN[:4] += 5
    free = make_router(4, score_function="sigmoid")(x_TN)
    assert (free.index_TK < 4).sum(-1).tolist() == [4, 4, 4, 4, 0, 0, 0, 0]
    limited = make_router(4, score_function="sigmoid", max_experts_per_token=2)(x_TN)
    assert (limited.index_TK < 4).sum(-1).tolist() == [2] * 8


# --- The causal rule of evaluation ------------------------------------------------------------------------------------


def train_step(router: ExpertChoiceRouter, x_TN: Tensor, context: RoutingContext) -> None:
    router.train()
    router.post_step(LayerLoad.of(router(x_TN, context), context.mask_T), 0.0)
    router.eval()


def test_threshold_is_the_mean_over_sequences_of_the_lowest_score_taken() -> None:
    """C = 1 of 2 tokens: the largest scores of expert 0 are .9 and .6, of expert 1 .3 and .8."""
    router = make_router(2, capacity_factor=1.0, decoding="threshold")
    assert router.score_threshold is not None
    assert router.score_threshold.tolist() == [0.5, 0.5]  # the softmax of equal logits
    train_step(router, log([[0.9, 0.1], [0.7, 0.3], [0.6, 0.4], [0.2, 0.8]]), RoutingContext(batch_size=2))
    assert router.score_threshold.tolist() == pytest.approx([0.75, 0.55])
    routing = router(log([[0.8, 0.2], [0.5, 0.5], [0.4, 0.6]]))
    assert routing.index_TK.tolist() == [[0], [2], [1]]
    assert routing.weight_TK.flatten().tolist() == pytest.approx([0.8, 0.0, 0.6])


def test_first_steps_count_alike_and_later_ones_decay() -> None:
    router = make_router(1, score_function="sigmoid", capacity_factor=1.0, decoding="threshold", threshold_decay=0.75)
    assert router.score_threshold is not None
    expected = 0.0
    for step, value in enumerate([0.2, 0.4, 0.9, 0.1, 0.7, 0.3], start=1):
        train_step(router, torch.tensor([[value]], dtype=torch.float64).logit(), RoutingContext())
        rate = max(1 / step, 0.25)
        expected = (1 - rate) * expected + rate * value
        assert router.score_threshold.item() == pytest.approx(expected)


def test_threshold_does_not_depend_on_micro_batches_and_ignores_padding() -> None:
    x_BLN = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask_BL = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    whole, split = (make_router(2, decoding="threshold", capacity_factor=1.0) for _ in range(2))
    train_step(whole, x_BLN.flatten(0, 1), RoutingContext(batch_size=3, mask_T=mask_BL.flatten()))
    parts = [LayerLoad.of(split(x_BLN[row], RoutingContext(mask_T=mask_BL[row])), mask_BL[row]) for row in range(3)]
    split.post_step(parts[0] + parts[1] + parts[2], 0.0)
    assert whole.score_threshold is not None
    torch.testing.assert_close(split.score_threshold, whole.score_threshold)
    scores_BLN = x_BLN.softmax(-1)
    expected_N = (scores_BLN[0].sort(0).values[-2] + scores_BLN[1, :2].max(0).values) / 2
    torch.testing.assert_close(whole.score_threshold, expected_N.float())


def test_step_of_nothing_but_padding_leaves_the_threshold() -> None:
    router = make_router(2, decoding="threshold")
    assert router.score_threshold is not None
    before_N = router.score_threshold.clone()
    train_step(router, torch.ones(3, 2, dtype=torch.float64), RoutingContext(mask_T=torch.zeros(3, dtype=torch.bool)))
    assert torch.equal(router.score_threshold, before_N)


def test_trained_threshold_gives_about_the_same_load_as_choosing() -> None:
    router = make_router(8, decoding="threshold")
    generator = torch.Generator().manual_seed(0)
    shift_N = torch.randn(8, dtype=torch.float64, generator=generator)  # some experts score all tokens higher
    for _ in range(100):
        x_TN = torch.randn(4 * 64, 8, dtype=torch.float64, generator=generator) + shift_N
        train_step(router, x_TN, RoutingContext(batch_size=4))
    x_TN = torch.randn(4096, 8, dtype=torch.float64, generator=generator) + shift_N
    load = LayerLoad.of(router(x_TN))
    torch.testing.assert_close(load.load_N / load.tokens, torch.full((8,), 0.25), rtol=0, atol=0.03, check_dtype=False)


def test_evaluation_keeps_the_limit_of_a_token_exactly() -> None:
    router = make_router(4, training=False, decoding="threshold", max_experts_per_token=2, score_function="sigmoid")
    routing = router(torch.tensor([[3.0, 1.0, 2.0, -1.0], [-1.0, -1.0, -1.0, 1.0]], dtype=torch.float64))
    assert routing.index_TK.tolist() == [[0, 2], [3, 4]]


def test_only_models_with_thresholds_can_decode() -> None:
    assert ExpertChoiceConfig(decoding="threshold").unservable is None
    reason = ExpertChoiceConfig(scope="batch").unservable
    assert reason is not None
    assert "later tokens and other sequences; models trained with decoding: threshold can decode" in reason


# --- Refusals ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no capacity": ({"capacity_factor": 0}, r"capacity_factor = 0 is not valid; input should be greater than 0"),
    "more than all experts": (
        {"capacity_factor": 8.5},
        r"capacity_factor = 8.5 is larger than num_experts \(8\); choose at most 8",
    ),
    "limit below the mean": (
        {"capacity_factor": 2.5, "max_experts_per_token": 2},
        r"capacity_factor = 2.5 needs more experts per token than max_experts_per_token \(2\) allows; choose at most 2",
    ),
    "capacity that is never used": (
        {"decoding": "threshold", "evaluation_capacity_factor": 1.0},
        r"evaluation_capacity_factor = 1.0 has no effect with decoding: threshold",
    ),
    "unknown scope": ({"scope": "document"}, r"scope = 'document' is not one of the choices"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_configuration_is_refused_by_name(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ConfigError, match=f"^{message}"):
        ExpertChoiceConfig.from_dict(fields).build(4, 8)
