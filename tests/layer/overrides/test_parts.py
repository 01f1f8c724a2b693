"""Worked numbers of every part, and how parts act together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError, UnsupportedOverride
from moesaic.layer import Router, Routing, RoutingContext, TopKConfig
from moesaic.layer.overrides import (
    DynamicExperts,
    FixedExperts,
    NullBelow,
    OverridePart,
    Parts,
    RandomExperts,
    Rank,
    RowOverrides,
    ScaledWeights,
    TemperedWeights,
    TopK,
    TotalWeights,
    WithoutExperts,
    check_parts,
)
from moesaic.layer.routers import NullExpertsConfig

SHARES = torch.tensor([[0.40, 0.25, 0.20, 0.15]], dtype=torch.float64)


def router_of(shares: Tensor = SHARES, **fields: Any) -> tuple[Router, Tensor]:
    """A router that gives these shares of the softmax to inputs that are unit vectors."""
    tokens, experts = shares.shape
    router = TopKConfig(**{"top_k": 2, **fields}).build(tokens, experts)
    router.double().weight.data.copy_(shares.log().T)  # type: ignore[union-attr]
    return router.eval(), torch.eye(tokens, dtype=torch.float64)


def routed(
    *parts: OverridePart, shares: Tensor = SHARES, context: RoutingContext | None = None, **fields: Any
) -> Routing:
    router, x_TD = router_of(shares, **fields)
    check_parts(parts, {0: router})
    context = context or RoutingContext()
    return Parts(parts)(context, len(x_TD))(0, router, router(x_TD, context), context)


def picks(routing: Routing, token: int = 0) -> dict[int, float]:
    pairs = zip(routing.choice_TK[token].tolist(), routing.weight_TK[token].tolist(), strict=True)
    return {expert: round(weight, 4) for expert, weight in pairs if expert < routing.num_columns}


NORMED: dict[str, Any] = {"normalize_top_k": True}


@pytest.mark.parametrize(
    ("part", "fields", "expected"),
    [
        (TopK(k=2), NORMED, {0: 0.6154, 1: 0.3846}),
        (TopK(k=3), NORMED, {0: 0.4706, 1: 0.2941, 2: 0.2353}),
        (TopK(k=1), {}, {0: 0.4}),
        (Rank(rank=(2,)), NORMED, {1: 1.0}),
        (Rank(rank=(2,)), {}, {1: 0.25}),
        (Rank(rank=(2,)), {"scaling_factor": 16.0}, {1: 4.0}),
        (Rank(rank=(2,)), {"softmax_over": "selected"}, {1: 1.0}),
        (Rank(rank=(1, 3)), NORMED, {0: 0.6667, 2: 0.3333}),
        (FixedExperts(experts=(3, 0)), {}, {3: 0.15, 0: 0.4}),
        (FixedExperts(experts=(3,)), NORMED, {3: 1.0}),
        (WithoutExperts(without=(0,)), {}, {1: 0.25, 2: 0.2}),
        (WithoutExperts(without=(1,)), NORMED, {0: 0.6667, 2: 0.3333}),
        (WithoutExperts(without=(3,)), NORMED, {0: 0.6154, 1: 0.3846}),
        (DynamicExperts(dynamic=0.6), NORMED, {0: 0.6154, 1: 0.3846}),
        (DynamicExperts(dynamic=0.3), NORMED, {0: 1.0}),
        (DynamicExperts(dynamic=0.9), {}, {0: 0.4, 1: 0.25, 2: 0.2, 3: 0.15}),
        (DynamicExperts(dynamic=0.9, most=3), {}, {0: 0.4, 1: 0.25, 2: 0.2}),
        (NullBelow(null=0.39), NORMED, {0: 1.0}),
        (NullBelow(null=0.39, weights="kept"), NORMED, {0: 0.6154}),
        (NullBelow(null=0.38), NORMED, {0: 0.6154, 1: 0.3846}),
        (NullBelow(null=1.0), {}, {0: 0.4}),
        (ScaledWeights(scale=2), NORMED, {0: 1.2308, 1: 0.7692}),
        (TotalWeights(total=1), {}, {0: 0.6154, 1: 0.3846}),
        # .4^2 : .25^2, of the sum .65 that they had
        (TemperedWeights(temperature=0.5), {}, {0: 0.4674, 1: 0.1826}),
        (TemperedWeights(temperature=0.5), NORMED, {0: 0.7191, 1: 0.2809}),
    ],
)
def test_worked_numbers(part: OverridePart, fields: dict[str, Any], expected: dict[int, float]) -> None:
    assert picks(routed(part, **fields)) == expected


def test_ranks_beyond_the_experts_are_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"rank = 5 is more than the 4 experts .* in layer 0; choose 1 to 4"):
        routed(Rank(rank=(5,)))
    with pytest.raises(ConfigError, match=r"k = 9 is more than the 4"):
        routed(TopK(k=9))
    grouped: dict[str, Any] = {"num_groups": 2, "top_k_groups": 1}
    assert picks(routed(Rank(rank=(2,)), **grouped)) == {1: 0.25}
    with pytest.raises(ConfigError, match=r"rank = 3 is more than the 2 experts that a token may have"):
        routed(Rank(rank=(3,)), **grouped)
    with pytest.raises(UnsupportedOverride, match=r"rank = 2 in layer 0 needs 2 experts, and token 0 has only 1"):
        routed(WithoutExperts(without=(0,)), Rank(rank=(2,)), **grouped)


@pytest.mark.parametrize("mask", ["-inf", "zero"])
def test_ranks_stay_inside_the_groups_that_are_admitted(mask: str) -> None:
    shares = torch.tensor([[0.05, 0.40, 0.30, 0.25]], dtype=torch.float64)
    grouped: dict[str, Any] = {"num_groups": 2, "top_k_groups": 1, "group_mask_value": mask}
    assert picks(routed(Rank(rank=(2,)), shares=shares, **grouped)) == {0: 0.05}
    drawn = {
        expert for seed in range(40) for expert in picks(routed(RandomExperts(seed=seed), shares=shares, **grouped))
    }
    assert drawn == {0, 1}
    # Fixed ones may be anywhere.
    assert picks(routed(FixedExperts(experts=(3,)), shares=shares, **grouped)) == {3: 0.25}


def test_equal_experts_rank_by_their_number() -> None:
    shares = torch.full((1, 4), 0.25, dtype=torch.float64)
    for rank in range(1, 5):
        assert picks(routed(Rank(rank=(rank,)), shares=shares)) == {rank - 1: 0.25}


def test_the_selection_bias_ranks_and_the_score_weighs() -> None:
    router, x_TD = router_of(selection_bias=True)
    router.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))  # type: ignore[union-attr]
    context = RoutingContext()
    found = Parts([Rank(rank=(1,))])(context, 1)(0, router, router(x_TD, context), context)
    assert picks(found) == {2: 0.2}


def test_parts_act_by_phase_wherever_they_stand() -> None:
    written = (TemperedWeights(temperature=0.5), TopK(k=3), NullBelow(null=0.26), WithoutExperts(without=(0,)))
    expected = {1: 0.6098, 2: 0.3902}  # the best three of 1, 2, 3; .15 / .6 is below .26; squares of .25 and .2
    for order in (written, written[::-1]):
        assert picks(routed(*order, **NORMED)) == expected
    assert picks(routed(ScaledWeights(scale=3), TotalWeights(), **NORMED)) == {0: 0.6154, 1: 0.3846}
    assert picks(routed(TotalWeights(), ScaledWeights(scale=2), **NORMED)) == {0: 1.2308, 1: 0.7692}


def test_one_part_chooses_in_a_layer() -> None:
    with pytest.raises(ConfigError, match=r"chooses the experts of layer 0, and so does k"):
        routed(TopK(k=3), Rank(rank=(2,)))
    router, _ = router_of()
    check_parts([TopK(k=3, layers=(0,)), Rank(rank=(2,), layers=(1,))], {0: router, 1: router})
    with pytest.raises(ConfigError, match=r"rank\.layers = 7 is a layer without a router; routers are in \[0, 1\]"):
        check_parts([Rank(rank=(2,), layers=(7,))], {0: router, 1: router})


def test_own_number_of_picks_changes_no_bit() -> None:
    router, x_TD = router_of(torch.rand(9, 4, dtype=torch.float64).softmax(-1))
    context, before = RoutingContext(), router(x_TD)
    assert Parts([TopK(k=2)])(context, 9)(0, router, before, context) is before
    kept = Parts([WithoutExperts(without=(0,))])(context, 9)(0, router, before, context)
    for token in range(9):
        if 0 not in before.index_TK[token]:
            assert torch.equal(kept.weight_TK[token], before.weight_TK[token])
            assert torch.equal(kept.index_TK[token], before.index_TK[token])


def test_random_experts_do_not_depend_on_the_batch() -> None:
    shares = torch.full((12, 8), 0.125, dtype=torch.float64)
    ids_T = torch.tensor([5, 6, 7, 8, 9, 10, 0, 0, 5, 6, 7, 8])  # the second row is padded by two
    mask_T = torch.tensor([1] * 6 + [0, 0] + [1] * 4).bool()
    context = RoutingContext(batch_size=2, token_ids_T=ids_T, mask_T=mask_T)
    two = routed(RandomExperts(random=2, seed=3), shares=shares, context=context)
    assert torch.equal(two.index_TK[8:], two.index_TK[:4])
    assert len(two.index_TK[:6].unique()) > 2
    alone = RoutingContext(token_ids_T=ids_T[8:], position_T=torch.arange(4))
    one = routed(RandomExperts(random=2, seed=3), shares=shares[:4], context=alone)
    assert torch.equal(one.index_TK, two.index_TK[8:])
    other = routed(RandomExperts(random=2, seed=4), shares=shares, context=context)
    assert not torch.equal(other.index_TK, two.index_TK)
    assert (two.index_TK[:, 0] != two.index_TK[:, 1]).all()


def test_random_experts_are_uniform() -> None:
    shares = torch.full((4000, 4), 0.25, dtype=torch.float64)
    router, _ = router_of(shares[:1])
    router_x = torch.ones(4000, 1, dtype=torch.float64)
    context = RoutingContext(token_ids_T=torch.arange(4000) % 97)
    found = Parts([RandomExperts()])(context, 4000)(0, router, router(router_x), context)
    counts = found.index_TK.flatten().bincount(minlength=4)
    assert ((counts - 1000).abs() < 120).all()  # four standard deviations


def test_rows_have_overrides_of_their_own() -> None:
    shares = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    router, x_TD = router_of(shares, **NORMED)
    context = RoutingContext(batch_size=3)
    before = router(x_TD, context)
    three, second = Parts([TopK(k=3)]), Parts([Rank(rank=(2,))])
    found = RowOverrides([None, three, second])(context, 6)(0, router, before, context)
    assert found.top_k == 3
    assert torch.equal(found.weight_TK[:2, :2], before.weight_TK[:2])
    assert (found.index_TK[:2, 2] == 4).all()
    alone = three(context, 6)(0, router, before, context)
    assert torch.equal(found.weight_TK[2:4], alone.weight_TK[2:4])
    assert torch.equal(found.weight_TK[4:], torch.tensor([[1.0, 0, 0]] * 2, dtype=torch.float64))
    assert (found.index_TK[4:, 1:] == 4).all()
    # Fewer entries stand for as many rows each, one after another.
    spread = RowOverrides([second])(context, 6)(0, router, before, context)
    assert spread.top_k == 1
    with pytest.raises(ConfigError, match=r"rows = 2 entries do not fit a batch of 3 rows"):
        RowOverrides([None, second])(context, 6)
    with pytest.raises(ConfigError, match="is empty"):
        RowOverrides([])


def test_a_token_that_the_override_is_not_for_may_have_too_few_experts() -> None:
    shares = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    router, x_TD = router_of(shares, num_groups=2, top_k_groups=1)
    context = RoutingContext(batch_size=2)
    # Row 1 may pick 2 and 3; for row 0, whose group loses expert 0, rank 2 does not exist.
    parts = Parts([WithoutExperts(without=(0,)), Rank(rank=(2,))])
    before = router(x_TD, context)
    found = RowOverrides([None, parts])(context, 2)(0, router, before, context)
    assert found.index_TK[1].tolist() == [2, 4]
    with pytest.raises(UnsupportedOverride, match="token 0 has only 1"):
        RowOverrides([parts, None])(context, 2)(0, router, before, context)


def test_null_experts_are_ranked_and_passed_on() -> None:
    config = NullExpertsConfig(top_k=2, num_null=2, normalize_over="none", null_output="identity", scaling_factor=2.0)
    router = config.build(1, 2).double()
    router.weight.data.copy_(SHARES.log().T[[1, 3, 0, 2]])  # type: ignore[union-attr]  experts .25 .15, nulls .4 .2
    context, x_TD = RoutingContext(), torch.ones(1, 1, dtype=torch.float64)
    before = router(x_TD, context)

    def found(*parts: OverridePart) -> Routing:
        return Parts(parts)(context, 1)(0, router, before, context)

    three = found(TopK(k=3))
    assert three.choice_TK.tolist() == [[2, 0, 3]]
    assert three.identity_weight_T is not None
    assert three.identity_weight_T.item() == pytest.approx(1.2)
    assert three.weight_TK.flatten().tolist() == pytest.approx([0, 0.5, 0])
    halved = found(ScaledWeights(scale=0.5))
    assert halved.identity_weight_T is not None
    assert halved.identity_weight_T.item() == pytest.approx(0.4)
    again = Parts([ScaledWeights(scale=0.5)])(context, 1)(0, router, halved, context)
    assert again.identity_weight_T is not None
    assert again.identity_weight_T.item() == pytest.approx(0.2)
    assert again.weight_TK.flatten().tolist() == pytest.approx([0, 0.125])


def test_weights_are_differentiable_and_finite() -> None:
    router, x_TD = router_of(**NORMED)
    context = RoutingContext()
    parts = Parts([TopK(k=3), NullBelow(null=0.24), TemperedWeights(temperature=2.0)])
    found = parts(context, 1)(0, router, router(x_TD, context), context)
    assert (found.index_TK == 4).sum() == 1
    found.weight_TK[0, 0].backward()
    grad = router.get_parameter("weight").grad
    assert grad is not None
    assert grad.isfinite().all()
    assert grad.norm() > 0


def test_bad_fields() -> None:
    for make in (
        lambda: Rank.from_dict({"rank": [0]}),
        lambda: Rank.from_dict({"rank": [2, 2]}),
        lambda: DynamicExperts.from_dict({"dynamic": 1.0}),
        lambda: TemperedWeights.from_dict({"temperature": 0}),
        lambda: ScaledWeights.from_dict({"scale": -1}),
        lambda: routed(FixedExperts(experts=(4,))),
        lambda: routed(WithoutExperts(without=(0, 1, 2, 3))),
        lambda: routed(RandomExperts(random=5)),
    ):
        with pytest.raises(ConfigError):
            make()
