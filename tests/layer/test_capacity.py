"""Capacity: worked numbers, every policy against plain Python, and what a drop does to a block and its gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.errors import ConfigError
from moesaic.layer import (
    CapacityConfig,
    LayerLoad,
    LoadBalancing,
    MoEBlock,
    MoESpec,
    Routing,
    RoutingContext,
    limit_capacity,
    noise,
)
from moesaic.layer.capacity import _STREAM, _places
from moesaic.layer.routers.scores import score, top_k

# Six tokens and three experts, the numbers of DeepSpeed 0.19.8's top1gating, top2gating and topkgating.
LOGITS = torch.tensor(
    [[2, 1, 0.1], [1.9, 0.2, 0.3], [0.5, 1.5, 0.4], [2.2, 0.1, 0.7], [0.3, 0.2, 1.1], [1.2, 0.6, 0]],
    dtype=torch.float64,
)
# One layer of eight tokens, four experts and two choices each, best first (OpenMoE, arXiv 2402.01739).
RANKED = torch.tensor([[0, 1], [2, 3], [0, 1], [1, 2], [2, 0], [0, 3], [1, 0], [1, 0]])
POLICIES = ["position", "probability", "weight", "batch_priority", "random"]
SCOPES, ORDERS = ["sequence", "batch"], ["token_first", "rank_first"]


def config_of(**values: Any) -> CapacityConfig:
    return CapacityConfig.from_dict({"factor": 1.0, "minimum": 0, **values})


def route(logits_TN: Tensor, k: int, *, normalize: bool = False, function: Any = "softmax") -> Routing:
    scores_TN = score(logits_TN, function)
    index_TK = top_k(scores_TN, k, stable=True)
    weight_TK = scores_TN.gather(-1, index_TK)
    if normalize:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    return Routing(index_TK, weight_TK, logits_TN, scores_TN, scores_TN.detach())


def from_picks(index_TK: Tensor, num_experts: int) -> Routing:
    """A record whose first picks have the higher score."""
    scores_TN = torch.full((len(index_TK), num_experts), 0.01, dtype=torch.float64)
    falling_K = 1 / torch.arange(2, index_TK.shape[1] + 2, dtype=torch.float64)
    scores_TN = scores_TN.scatter(-1, index_TK, falling_K.expand(index_TK.shape))
    return Routing(index_TK, scores_TN.gather(-1, index_TK), scores_TN, scores_TN, scores_TN)


def limit(routing: Routing, config: CapacityConfig, context: RoutingContext | None = None, **values: Any) -> Routing:
    return limit_capacity(routing, config, context, **{"training": True, "layer": 0, **values})


def kept(routing: Routing, expert: int) -> list[int]:
    """Tokens that the expert serves."""
    return (routing.index_TK == expert).any(-1).nonzero().flatten().tolist()


def seeded(seed: int, batch_size: int = 1, mask_T: Tensor | None = None) -> RoutingContext:
    return RoutingContext(batch_size=batch_size, seed=torch.tensor(seed), mask_T=mask_T)


# --- The number of slots ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "values", "expected"),
    [
        # DeepSpeed's capacity table and gates.
        (8, 4, 1, {"minimum": 4}, 4),
        (6, 4, 1, {"factor": 1.25, "minimum": 1}, 2),
        (100, 8, 1, {"factor": 1.25, "minimum": 4}, 16),
        (7, 4, 1, {}, 2),
        (6, 3, 1, {}, 2),
        (6, 3, 1, {"factor": 1.5}, 3),
        (6, 3, 2, {}, 4),
        (6, 3, 2, {"factor": 0.75}, 3),
        # Tutel's rule beside DeepSpeed's.
        (10, 4, 2, {"rounding": "tutel"}, 6),
        (10, 4, 2, {}, 5),
        # FSMoE's launcher: 6 slots, padded to the least common multiple of the pipeline degrees.
        (10, 4, 2, {"factor": 1.2}, 6),
        (10, 4, 2, {"factor": 1.2, "multiple_of": 4}, 8),
        # OpenMoE's PyTorch port: rounded down, up to even, at least 4.
        *[
            (tokens, 32, 2, {"factor": 2, "rounding": "floor", "multiple_of": 2, "minimum": 4}, expected)
            for tokens, expected in {1: 4, 10: 4, 37: 4, 45: 6, 100: 12, 512: 64, 2048: 256}.items()
        ],
        # OpenMoE's JAX training: K is not multiplied in, so the factor is 1.25 / 2; 2.5 is rounded to even.
        (4096, 32, 2, {"factor": 0.625, "rounding": "nearest"}, 160),
        (64, 32, 2, {"factor": 0.625, "rounding": "nearest"}, 2),
        (6, 4, 1, {"rounding": "nearest"}, 2),
        (10, 4, 1, {"rounding": "nearest"}, 2),
        (7, 4, 1, {"rounding": "nearest"}, 2),
        (5, 4, 1, {"rounding": "nearest"}, 1),
        # In floating point 10 * 1.1 is a little more than 11.
        (10, 1, 1, {"factor": 1.1}, 11),
        (0, 4, 2, {}, 0),
        (0, 4, 2, {"minimum": 3, "multiple_of": 2}, 4),
    ],
)
def test_number_of_slots(tokens: int, experts: int, k: int, values: dict[str, Any], expected: int) -> None:
    assert config_of(**values).slots(torch.tensor(tokens), experts, k, training=True).item() == expected


def test_evaluation_has_its_own_factor() -> None:
    config = config_of(factor=1, eval_factor=2)
    tokens = torch.tensor([8, 16])
    assert config.slots(tokens, 4, 1, training=True).tolist() == [2, 4]
    assert config.slots(tokens, 4, 1, training=False).tolist() == [4, 8]


def test_evaluation_drops_nothing_by_default() -> None:
    routing = route(LOGITS, 2)
    assert limit(routing, config_of(), training=False) is routing
    assert limit(routing, config_of(factor=None, eval_factor=1), training=True) is routing


# --- Worked numbers ---------------------------------------------------------------------------------------------------


def test_top_1() -> None:
    routing = route(LOGITS, 1)
    limited = limit(routing, config_of())
    assert LayerLoad.of(limited).chosen_M.tolist() == [4, 1, 1]
    assert LayerLoad.of(limited).load_N.tolist() == [2, 1, 1]
    assert LayerLoad.of(limited).dropped == 2
    assert kept(limited, 0) == [0, 1]
    expected = torch.tensor([0.6590, 0.7222, 0.5880, 0, 0.5388, 0], dtype=torch.float64)
    torch.testing.assert_close(limited.weight_TK.flatten(), expected, atol=5e-5, rtol=0)
    loss_B = LoadBalancing(coefficient=1).per_sequence(limited, RoutingContext())
    assert loss_B.item() == pytest.approx(1.280841, abs=1e-6)  # on what was chosen, before drops
    assert kept(limit(routing, config_of(factor=1.5)), 0) == [0, 1, 3]


def test_top_1_random_token_selection_keeps_each_candidate_equally_often() -> None:
    routing, config = route(LOGITS, 1), config_of(policy="random")
    draws = [kept(limit(routing, config, seeded(seed)), 0) for seed in range(6000)]
    assert all(len(tokens) == 2 for tokens in draws)
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=6) / 6000
    assert counts[[2, 4]].tolist() == [0, 0]
    torch.testing.assert_close(counts[[0, 1, 3, 5]], torch.full((4,), 0.5), atol=0.026, rtol=0)  # four deviations


def test_top_2_places_all_first_choices_first_and_renormalises() -> None:
    routing = route(LOGITS, 2, normalize=True)
    limited = limit(routing, config_of(choice_order="rank_first", renormalize=True))
    assert LayerLoad.of(limited).chosen_M.tolist() == [6, 3, 3]
    assert kept(limited, 0) == [0, 1, 3, 5]
    assert limited.dropped_TK is not None
    assert limited.dropped_TK.tolist() == [[False, token in (2, 4)] for token in range(6)]
    torch.testing.assert_close(limited.weight_TK[[2, 4]], torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double())
    expected = torch.tensor([0.7311, 0.2689], dtype=torch.float64)
    torch.testing.assert_close(limited.weight_TK[0], expected, atol=5e-5, rtol=0)
    # Megatron leaves the weight as it was.
    left = limit(routing, config_of(choice_order="rank_first"))
    torch.testing.assert_close(left.weight_TK[2], torch.tensor([0.7311, 0]).double(), atol=5e-5, rtol=0)


def test_top_k_by_probability_and_by_position() -> None:
    routing = route(LOGITS, 2, normalize=True)
    loss_B = LoadBalancing(coefficient=1).per_sequence(routing, RoutingContext())
    assert loss_B.item() == pytest.approx(1.140421, abs=1e-6)
    by_probability = limit(routing, config_of(factor=0.75, policy="probability", renormalize=True))
    assert kept(by_probability, 0) == [0, 1, 3]
    torch.testing.assert_close(by_probability.weight_TK[[2, 4, 5]].amax(-1), torch.ones(3).double())
    assert (by_probability.index_TK[[2, 4, 5]] < 3).sum(-1).tolist() == [1, 1, 1]
    by_position = limit(routing, config_of(factor=0.75, renormalize=True))
    assert kept(by_position, 0) == [0, 1, 2]
    expected = torch.tensor([0.7311, 0.2689], dtype=torch.float64)
    torch.testing.assert_close(by_position.weight_TK[2], expected, atol=5e-5, rtol=0)
    torch.testing.assert_close(by_position.weight_TK[[3, 4, 5]].amax(-1), torch.ones(3).double())


@pytest.mark.parametrize(
    ("order", "capacity", "expected"),
    [
        ("rank_first", 4, [0, 0, 0.5, 0, 0, 0, 0.5, 0.5]),
        ("token_first", 4, [0, 0, 0, 0, 0, 0, 0.5, 1]),
        ("rank_first", 3, [0.5, 0, 0.5, 0, 0.5, 0, 0.5, 0.5]),
        ("token_first", 3, [0, 0, 0, 0, 0, 0.5, 1, 1]),
        ("rank_first", 2, [0.5, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 1]),
    ],
)
def test_choice_order_moves_drops_and_not_their_number(order: Any, capacity: int, expected: list[float]) -> None:
    """OpenMoE's drop towards the end, by position (figure 12)."""
    limited = limit(from_picks(RANKED, 4), config_of(factor=capacity / 4, choice_order=order))
    assert limited.dropped_TK is not None
    assert limited.dropped_TK.double().mean(-1).tolist() == expected
    assert limited.dropped_TK.sum() == sum(max(0, load - capacity) for load in (6, 5, 3, 2))


def test_weights_and_scores_differ_where_weights_are_normalised() -> None:
    """A token that is unsure about all experts can be sure between its picks."""
    scores_TN = torch.tensor([[0.3, 0.2, 0.25, 0.25], [0.5, 0.5, 0, 0]])
    index_TK, weight_TK = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.6, 0.4], [0.5, 0.5]])
    pair = Routing(index_TK, weight_TK, scores_TN, scores_TN, scores_TN)
    assert kept(limit(pair, config_of(policy="weight")), 0) == [0]
    assert kept(limit(pair, config_of(policy="probability")), 0) == [1]


def test_batch_priority_keeps_the_tokens_whose_best_expert_is_surest() -> None:
    """V-MoE, one slot: tokens come in the order 3, 1, 0, 2, 5, 4."""
    limited = limit(route(LOGITS, 2), config_of(factor=0.25, policy="batch_priority"))
    assert [kept(limited, expert) for expert in range(3)] == [[3], [0], [3]]
    limited = limit(route(LOGITS, 2), config_of(factor=0.25, policy="batch_priority", choice_order="rank_first"))
    assert [kept(limited, expert) for expert in range(3)] == [[3], [2], [4]]
    limited = limit(route(LOGITS, 2), config_of(factor=0.25, policy="probability"))
    assert [kept(limited, expert) for expert in range(3)] == [[3], [2], [4]]


# --- Bias towards early tokens ----------------------------------------------------------------------------------------


def test_random_selection_takes_away_the_bias_against_late_tokens_and_not_the_drops() -> None:
    """2,000 uniform top-1 routings of 64 tokens to 8 experts with 8 slots, as sequences of one batch."""
    draws, tokens = 2000, 64
    generator = torch.Generator().manual_seed(0)
    routing = from_picks(torch.randint(8, (draws * tokens, 1), generator=generator), 8)
    rates, totals = {}, {}
    for policy in ("position", "random"):
        dropped_TK = limit(routing, config_of(policy=policy), seeded(1, draws)).dropped_TK
        assert dropped_TK is not None
        by_position_P = dropped_TK.view(draws, tokens).double().mean(0)
        rates[policy] = by_position_P.view(4, -1).mean(-1)
        totals[policy] = int(dropped_TK.sum())
        assert by_position_P.mean().item() == pytest.approx(0.1305, abs=0.005)
        if policy == "position":
            assert by_position_P[-1].item() == pytest.approx(0.538, abs=0.03)
    expected = torch.tensor([0, 0.010, 0.121, 0.391], dtype=torch.float64)
    torch.testing.assert_close(rates["position"], expected, atol=0.02, rtol=0)
    assert rates["random"].max() - rates["random"].min() < 0.02
    assert totals["random"] == totals["position"]


# --- Against plain Python ---------------------------------------------------------------------------------------------


@st.composite
def records(draw: st.DrawFn) -> tuple[Routing, RoutingContext]:
    """A record with ties, empty and full experts, null experts and padding."""
    experts, nulls = draw(st.integers(1, 5)), draw(st.integers(0, 2))
    columns = experts + nulls
    k = draw(st.integers(1, columns))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(0, 6))
    tokens = batch * length
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    levels = draw(st.sampled_from([2, 4, 1000]))
    scores_TN = torch.randint(1, levels + 1, (tokens, columns), generator=generator).double() / levels
    skew_N = torch.arange(columns) * draw(st.sampled_from([0.0, 1.0]))
    choice_TK = (torch.rand(tokens, columns, generator=generator) + skew_N).argsort(-1)[:, :k]
    index_TK = choice_TK.masked_fill(choice_TK >= experts, experts)
    weight_TK = torch.rand(tokens, k, generator=generator, dtype=torch.float64)
    mask_T = torch.rand(tokens, generator=generator) < 0.75 if draw(st.booleans()) else None
    routing = Routing(
        index_TK, weight_TK, scores_TN, scores_TN, scores_TN, num_null=nulls, chosen_TK=choice_TK if nulls else None
    )
    return routing, seeded(draw(st.integers(0, 99)), batch, mask_T)


def plain(routing: Routing, config: CapacityConfig, context: RoutingContext, training: bool) -> list[list[bool]]:
    """Which picks are dropped, one pick after the other."""
    tokens, k, experts = len(routing.index_TK), routing.top_k, routing.num_experts
    length = tokens // context.batch_size
    real = [True] * tokens if context.mask_T is None else context.mask_T.tolist()
    index, scores = routing.index_TK.tolist(), routing.scores_TN.tolist()
    dropped = [[False] * k for _ in range(tokens)]
    for group in range(context.batch_size if config.scope == "sequence" else 1):
        size = length if config.scope == "sequence" else tokens
        members = [token for token in range(group * size, (group + 1) * size) if real[token]]
        slots = int(config.slots(torch.tensor(len(members)), experts, k, training))
        queue = []
        for token in members:
            sequence = token // length
            place = sum(real[sequence * length : token])
            drawn = context.batch_size if training or config.scope == "batch" else 1
            unit = noise.uniform(
                context if training else None, 0, (length, drawn, k), stream=_STREAM, like=routing.scores_TN
            )[place, sequence % drawn].tolist()
            wanted = [pick for pick in range(k) if index[token][pick] < experts]
            wanted.sort(key=lambda pick: (-scores[token][index[token][pick]], index[token][pick]))
            best = max((scores[token][index[token][pick]] for pick in wanted), default=0)
            for rank, pick in enumerate(wanted):
                base = (rank, token) if config.choice_order == "rank_first" else (token, rank)
                own = scores[token][index[token][pick]]
                first = (rank,) if config.choice_order == "rank_first" else ()
                key = {
                    "position": base,
                    "probability": (-own, *base),
                    "weight": (-routing.weight_TK[token, pick].item(), *base),
                    "batch_priority": (*first, -best, token, rank),
                    "random": (*first, unit[rank], token, rank),
                }[config.policy]
                queue.append((key, token, pick))
        taken = [0] * experts
        for _, token, pick in sorted(queue):
            expert = index[token][pick]
            dropped[token][pick] = taken[expert] >= slots
            taken[expert] += 1
    return dropped


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalised", "left"])
@pytest.mark.parametrize(("policy", "scope", "order"), list(itertools.product(POLICIES, SCOPES, ORDERS)))
@settings(max_examples=25)
@given(case=records(), factor=st.sampled_from([0.25, 0.5, 1.0, 1.5]), minimum=st.integers(0, 2))
def test_equals_one_pick_after_the_other(
    policy: str,
    scope: str,
    order: str,
    renormalize: bool,
    training: bool,
    case: tuple[Routing, RoutingContext],
    factor: float,
    minimum: int,
) -> None:
    routing, context = case
    config = config_of(
        factor=factor,
        eval_factor=factor,
        minimum=minimum,
        policy=policy,
        scope=scope,
        choice_order=order,
        renormalize=renormalize,
    )
    limited = limit(routing, config, context, training=training)
    expected = plain(routing, config, context, training)
    assert limited.dropped_TK is not None
    assert limited.dropped_TK.tolist() == expected
    assert torch.equal(limited.choice_TK, routing.choice_TK)
    real = [True] * len(expected) if context.mask_T is None else context.mask_T.tolist()
    for token, lost in enumerate(expected):
        before, picks = routing.weight_TK[token].tolist(), routing.index_TK[token].tolist()
        experts = [pick for pick, expert in enumerate(picks) if expert < routing.num_experts]
        alive = [pick for pick in experts if real[token] and not lost[pick]]
        total, left = sum(before[pick] for pick in experts), sum(before[pick] for pick in alive)
        ratio = total / left if renormalize and any(lost) and left else 1.0
        for pick, expert in enumerate(picks):
            served = pick in alive
            assert limited.index_TK[token, pick] == (expert if served else routing.num_experts)
            weight = before[pick] * (ratio if served else 1.0) if served or (pick not in experts and real[token]) else 0
            assert limited.weight_TK[token, pick].item() == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=50)
@given(case=records(), factor=st.sampled_from([0.25, 0.5, 1.0, 1.5]))
def test_an_expert_keeps_the_smaller_of_its_slots_and_its_picks(
    policy: str, case: tuple[Routing, RoutingContext], factor: float
) -> None:
    routing, context = case
    config = config_of(factor=factor, policy=policy, scope="batch")
    limited = limit(routing, config, context)
    chosen = LayerLoad.of(routing, context.mask_T)
    slots = config.slots(chosen.tokens, routing.num_experts, routing.top_k, training=True)
    load = LayerLoad.of(limited, context.mask_T)
    assert torch.equal(load.load_N, chosen.load_N.clamp(max=int(slots)))
    assert torch.equal(load.chosen_M, chosen.chosen_M)
    assert load.dropped == (chosen.load_N - load.load_N).sum()
    assert torch.equal(LayerLoad.of(limited).load_N, load.load_N)  # padding runs no expert


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=30)
@given(case=records())
def test_places_in_a_queue_are_unique_and_contiguous(policy: str, case: tuple[Routing, RoutingContext]) -> None:
    routing, context = case
    real_BL = torch.ones(context.batch_size, len(routing.index_TK) // context.batch_size, dtype=torch.bool)
    place_TK = _places(routing, config_of(policy=policy, scope="batch"), real_BL, context, True, 0)
    for expert in range(routing.num_experts):
        places = place_TK[routing.index_TK == expert].sort().values
        assert torch.equal(places, torch.arange(len(places)))
    assert (place_TK[routing.index_TK == routing.num_experts] == -1).all()


# --- Invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_all_negative_logits_are_routed_like_shifted_ones(policy: str, order: str) -> None:
    config = config_of(factor=0.5, policy=policy, choice_order=order, renormalize=True)
    expected = limit(route(LOGITS, 2, normalize=True), config, seeded(3))
    shifted = limit(route(LOGITS - 100, 2, normalize=True), config, seeded(3))
    assert torch.equal(shifted.index_TK, expected.index_TK)
    torch.testing.assert_close(shifted.weight_TK, expected.weight_TK)
    assert LayerLoad.of(shifted).load_N.tolist() == [2, 2, 2]


def test_sigmoid_scores_of_negative_logits_take_all_slots() -> None:
    limited = limit(route(LOGITS - 10, 2, function="sigmoid"), config_of(factor=0.5, policy="probability"))
    assert LayerLoad.of(limited).load_N.tolist() == [2, 2, 2]
    assert kept(limited, 0) == [0, 3]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_order_of_a_tokens_picks_carries_no_meaning(policy: str, order: str) -> None:
    config = config_of(factor=0.5, policy=policy, choice_order=order, renormalize=True)
    routing = route(LOGITS, 3, normalize=True)
    turned = Routing(
        routing.index_TK.flip(-1), routing.weight_TK.flip(-1), LOGITS, routing.scores_TN, routing.selection_TN
    )
    expected, actual = limit(routing, config, seeded(3)), limit(turned, config, seeded(3))
    assert torch.equal(actual.index_TK.flip(-1), expected.index_TK)
    torch.testing.assert_close(actual.weight_TK.flip(-1), expected.weight_TK)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize(("policy", "scope"), list(itertools.product(POLICIES, SCOPES)))
def test_padding_takes_no_slot_and_shifts_nothing(policy: str, scope: str, side: str, training: bool) -> None:
    batch, length, before, after = 3, 8, 3 * (side != "right"), 2 * (side != "left")
    logits_BTN = torch.randn(batch, length, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padded_BTN = torch.nn.functional.pad(logits_BTN, (0, 0, before, after), value=7.0)
    mask_BT = torch.zeros(batch, before + length + after, dtype=torch.bool)
    mask_BT[:, before : before + length] = True
    config = config_of(factor=0.75, eval_factor=0.75, policy=policy, scope=scope)
    expected = limit(route(logits_BTN.flatten(0, 1), 2), config, seeded(5, batch), training=training)
    context = seeded(5, batch, mask_BT.flatten())
    actual = limit(route(padded_BTN.flatten(0, 1), 2), config, context, training=training)
    assert torch.equal(actual.index_TK[mask_BT.flatten()], expected.index_TK)
    assert torch.equal(actual.dropped_TK[mask_BT.flatten()], expected.dropped_TK)  # type: ignore[index, arg-type]
    assert (actual.index_TK[~mask_BT.flatten()] == 4).all()
    assert not actual.dropped_TK[~mask_BT.flatten()].any()  # type: ignore[index]
    assert expected.dropped_TK.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("policy", "scope", "order"), list(itertools.product(POLICIES, SCOPES, ORDERS)))
def test_what_a_drop_depends_on_is_what_the_config_says(policy: str, scope: str, order: str, training: bool) -> None:
    config = config_of(factor=0.75, eval_factor=0.75, policy=policy, scope=scope, choice_order=order)
    declared = config.depends_on(training)
    batch, length = 3, 8
    logits_BTN = torch.randn(batch, length, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run(logits_BTN: Tensor, seed: int = 5) -> Tensor:
        context = seeded(seed, batch)
        return limit(route(logits_BTN.flatten(0, 1), 2), config, context, training=training).index_TK.view(
            batch, length, 2
        )

    expected = run(logits_BTN)
    moved = set()
    if any(not torch.equal(run(logits_BTN, seed), expected) for seed in range(5)):
        moved.add("random_numbers")
    for sequence, cut in itertools.product(range(batch), range(1, length)):
        changed_BTN = logits_BTN.clone()
        changed_BTN[sequence, cut:] *= -3
        if not torch.equal(run(changed_BTN)[sequence, :cut], expected[sequence, :cut]):
            moved.add("later_tokens")
    changed_BTN = logits_BTN.clone()
    changed_BTN[0] *= -3
    if not torch.equal(run(changed_BTN)[1:], expected[1:]):
        moved.add("other_sequences")
    assert moved == declared


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_in_evaluation_the_order_of_sequences_does_not_matter(policy: str, order: str) -> None:
    config = config_of(factor=0.75, eval_factor=0.5, policy=policy, choice_order=order)
    logits_BTN = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned_B = torch.tensor([2, 0, 1])

    def run(logits_BTN: Tensor) -> Tensor:
        routing = route(logits_BTN.flatten(0, 1), 2)
        return limit(routing, config, seeded(9, 3), training=False).index_TK.view(3, 8, 2)

    assert torch.equal(run(logits_BTN[turned_B]), run(logits_BTN)[turned_B])


def test_layers_and_seeds_draw_different_tokens() -> None:
    routing, config = route(LOGITS, 1), config_of(policy="random")
    by_layer = {tuple(kept(limit(routing, config, seeded(0), layer=layer), 0)) for layer in range(20)}
    by_seed = {tuple(kept(limit(routing, config, seeded(seed)), 0)) for seed in range(20)}
    assert min(len(by_layer), len(by_seed)) > 3


# --- In a block -------------------------------------------------------------------------------------------------------


def make_block(**values: Any) -> MoEBlock:
    torch.manual_seed(0)
    spec = MoESpec.from_dict(
        {
            "experts": {"num_experts": 4, "intermediate_size": 5},
            "router": {"type": "top_k", "top_k": 2, "normalize_top_k": True},
            **values,
        }
    )
    block = MoEBlock(spec, 6, layer=3).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    return block


@pytest.mark.parametrize("shared", [None, {"num_experts": 1}], ids=["routed_only", "shared"])
def test_a_token_that_lost_all_picks_gets_the_shared_experts_alone(shared: dict[str, Any] | None) -> None:
    block = make_block(shared_experts=shared, capacity={"factor": 0.25, "minimum": 0})
    x_BTD, context = torch.randn(2, 12, 6, dtype=torch.float64), RoutingContext(batch_size=2)
    y_BTD = block(x_BTD, context)
    routing = context.records[3]
    assert routing.dropped_TK is not None
    lost_BT = routing.dropped_TK.all(-1).view(2, 12)
    assert lost_BT.any()
    expected = torch.zeros_like(x_BTD) if block.shared_experts is None else block.shared_experts(x_BTD)
    torch.testing.assert_close(y_BTD[lost_BT], expected[lost_BT])
    # In evaluation nothing drops.
    block.eval()
    block(x_BTD, context := RoutingContext(batch_size=2))
    assert context.records[3].dropped_TK is None


@pytest.mark.parametrize("kernel", ["loop", "grouped"])
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalised", "left"])
def test_output_is_the_weighted_sum_over_the_picks_that_are_left(kernel: str, renormalize: bool) -> None:
    block = make_block(
        experts={"num_experts": 4, "intermediate_size": 5, "kernel": kernel},
        capacity={"factor": 0.5, "minimum": 0, "renormalize": renormalize},
    )
    x_TD, context = torch.randn(12, 6, dtype=torch.float64), RoutingContext()
    y_TD, routing = block(x_TD, context), context.records[3]
    one_11 = torch.ones(1, 1, dtype=torch.float64)
    for token in range(12):
        expected_1D = torch.zeros(1, 6, dtype=torch.float64)
        for pick in range(2):
            if routing.index_TK[token, pick] < 4:
                index_11 = routing.index_TK[token, pick].view(1, 1)
                expected_1D += routing.weight_TK[token, pick] * block.experts(x_TD[token : token + 1], index_11, one_11)
        torch.testing.assert_close(y_TD[token], expected_1D[0])


@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalised", "left"])
def test_gradients_reach_logits_through_the_weights_that_are_left(renormalize: bool) -> None:
    config = config_of(factor=0.5, renormalize=renormalize)

    def weights(logits_TN: Tensor) -> Tensor:
        return limit(route(logits_TN, 2), config).weight_TK

    logits_TN = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(weights, (logits_TN,))
    limited = limit(route(logits_TN, 2), config)
    dropped_TK = limited.dropped_TK
    assert dropped_TK is not None
    assert dropped_TK.all(-1).any()
    limited.weight_TK.sum().backward()
    assert logits_TN.grad is not None
    assert logits_TN.grad.isfinite().all()
    assert not logits_TN.grad[dropped_TK.all(-1)].any()
    assert logits_TN.grad[~dropped_TK.all(-1)].any(-1).all()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_recomputation_drops_the_same_tokens(policy: str, use_reentrant: bool) -> None:
    block = make_block(capacity={"factor": 0.5, "minimum": 0, "policy": policy, "renormalize": True})
    x_BTD = torch.randn(2, 12, 6, dtype=torch.float64)
    found = []
    for checkpointed in (False, True):
        block.zero_grad()
        leaf_BTD, context = x_BTD.clone().requires_grad_(), seeded(11, 2)
        y_BTD = (
            checkpoint(block, leaf_BTD, context, use_reentrant=use_reentrant)
            if checkpointed
            else block(leaf_BTD, context)
        )
        y_BTD.square().sum().backward()  # type: ignore[union-attr]
        found.append([context.records[3].index_TK, leaf_BTD.grad, *(p.grad for p in block.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)


def test_the_limit_compiles_to_one_graph() -> None:
    config = config_of(policy="random", choice_order="rank_first", renormalize=True)
    compiled = torch.compile(limit_capacity, fullgraph=True, backend="aot_eager")
    routing, context = route(LOGITS, 2), seeded(4, 2, torch.tensor([1, 1, 0, 1, 1, 1]).bool())
    expected = limit(routing, config, context)
    actual = compiled(routing, config, context, training=True, layer=0)
    assert torch.equal(actual.index_TK, expected.index_TK)
    torch.testing.assert_close(actual.weight_TK, expected.weight_TK)


# --- The config -------------------------------------------------------------------------------------------------------


def spec_with(capacity: dict[str, Any] | None) -> MoESpec:
    return MoESpec.from_dict(
        {
            "experts": {"num_experts": 4, "intermediate_size": 5},
            "router": {"type": "top_k", "top_k": 2},
            "capacity": capacity,
        }
    )


def test_a_spec_says_what_its_routing_depends_on() -> None:
    assert not spec_with(None).may_skip
    assert spec_with({"factor": 1}).may_skip
    assert spec_with({"factor": 1}).depends_on(training=True) == set()
    batch = spec_with({"factor": 1, "scope": "batch", "policy": "random"})
    assert batch.depends_on(training=True) == {"later_tokens", "other_sequences", "random_numbers"}
    assert batch.depends_on(training=False) == set()


def test_a_capacity_in_evaluation_can_not_be_served() -> None:
    assert spec_with(None).unservable is None
    assert spec_with({"factor": 1, "policy": "probability"}).unservable is None
    reason = spec_with({"factor": None, "eval_factor": 1}).unservable
    assert reason is not None
    assert reason.startswith("moe.capacity:")
    assert "eval_factor" in reason


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"factor": 0}, "capacity.factor = 0"),
        ({"factor": None}, "capacity.factor = None limits nothing"),
        ({"factor": 1, "policy": "fifo"}, "capacity.policy = 'fifo'"),
        ({"factor": 1, "minimum": -1}, "capacity.minimum = -1"),
        ({"factor": 1, "multiple_of": 0}, "capacity.multiple_of = 0"),
        ({"factor": 1, "capacity_factor": 1}, "capacity.capacity_factor"),
        ({}, "capacity.factor = None is required"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_with(values)
