"""Drops by position: a histogram of bounded size, filled by the recorder, and the rates that follow from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trace.models import LAYERS, TOP_K, tiny_model

from moesaic.layer import CapacityConfig, Routing, RoutingContext, limit_capacity
from moesaic.trace import PositionCounts, RoutingTrace, drop_rate, drop_rate_by_position, null_share, record
from moesaic.trace.counts.positions import BUCKETS

IDS = torch.arange(20).view(2, 10)
CAPACITY = {"factor": None, "eval_factor": 0.5, "minimum": 0}
# OpenMoE's worked example: eight tokens, four experts, two choices each, best first.
RANKED = torch.tensor([[0, 1], [2, 3], [0, 1], [1, 2], [2, 0], [0, 3], [1, 0], [1, 0]])


@settings(max_examples=50)
@given(data=st.data())
def test_counts_do_not_depend_on_how_they_come_in(data: st.DataObject) -> None:
    """Any order and any growth give the histogram of all positions with the final width."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    counts, seen = PositionCounts(), []
    for _ in range(data.draw(st.integers(1, 4))):
        longest = data.draw(st.sampled_from([1, 200, BUCKETS, BUCKETS + 1, 3000]))
        position_T = torch.randint(longest, (data.draw(st.integers(0, 20)),), generator=generator)
        picks_T = torch.randint(1, 4, position_T.shape, generator=generator)
        dropped_T = torch.minimum(picks_T, torch.randint(4, position_T.shape, generator=generator))
        counts.add(position_T, picks_T, dropped_T)
        seen.append(torch.stack([position_T, picks_T, dropped_T]))
    position_T, picks_T, dropped_T = torch.cat(seen, dim=1)
    longest = int(position_T.max()) + 1 if position_T.numel() else 0
    assert len(counts.picks_P) == len(counts.dropped_P) <= BUCKETS
    assert counts.width == 2 ** (max(longest - 1, 0) // BUCKETS).bit_length()
    for bucket in range(len(counts.picks_P)):
        inside_T = position_T // counts.width == bucket
        assert counts.picks_P[bucket] == picks_T[inside_T].sum()
        assert counts.dropped_P[bucket] == dropped_T[inside_T].sum()
    assert counts.picks_P.sum() == picks_T.sum()


def test_rates_by_position_and_in_parts() -> None:
    picks_P, dropped_P = torch.tensor([4, 4, 0, 2, 2, 2, 2]), torch.tensor([0, 1, 0, 1, 1, 2, 2])
    rates_P = drop_rate_by_position(picks_P, dropped_P)
    torch.testing.assert_close(rates_P, torch.tensor([0, 0.25, float("nan"), 0.5, 0.5, 1, 1]).double(), equal_nan=True)
    halves = drop_rate_by_position(picks_P, dropped_P, parts=2)
    torch.testing.assert_close(halves, torch.tensor([2 / 10, 5 / 6]).double())
    assert drop_rate_by_position(picks_P[:0], dropped_P[:0], parts=4).isnan().all()


def test_shares_of_nulls_and_drops() -> None:
    chosen_M = torch.tensor([3, 1, 4, 2])
    assert null_share(chosen_M, 2) == pytest.approx(0.6)
    assert null_share(chosen_M, 4) == 0
    assert null_share(torch.zeros(3, dtype=torch.int64), 2) == 0
    assert drop_rate(chosen_M, 2, 1) == pytest.approx(0.25)
    assert drop_rate(torch.zeros(3, dtype=torch.int64), 2, 0) == 0


@pytest.mark.parametrize(
    ("order", "capacity", "rates", "halves", "unserved"),
    [
        ("rank_first", 4, [0, 0, 0.5, 0, 0, 0, 0.5, 0.5], [0.125, 0.25], 0),
        ("token_first", 4, [0, 0, 0, 0, 0, 0, 0.5, 1], [0, 0.375], 1),
        ("rank_first", 3, [0.5, 0, 0.5, 0, 0.5, 0, 0.5, 0.5], [0.25, 0.375], 0),
    ],
)
def test_drop_towards_the_end(
    order: Any, capacity: int, rates: list[float], halves: list[float], unserved: int
) -> None:
    scores_TN = torch.zeros(8, 4).scatter(-1, RANKED, torch.tensor([0.6, 0.4]).expand(8, 2))
    routing = Routing(RANKED, scores_TN.gather(-1, RANKED), scores_TN, scores_TN, scores_TN)
    config = CapacityConfig(factor=capacity / 4, minimum=0, choice_order=order)
    context, trace = RoutingContext(), RoutingTrace("counts")
    context.commit(0, limit_capacity(routing, config, context, training=True, layer=0))
    trace.add(context)
    layer = trace.layers[0]
    assert layer.chosen_M.tolist() == [6, 5, 3, 2]
    assert layer.load_N.tolist() == [min(load, capacity) for load in (6, 5, 3, 2)]
    assert (layer.dropped, layer.unserved, layer.tokens) == (int(sum(rates) * 2), unserved, 8)
    found = layer.domain_positions[""]
    assert drop_rate_by_position(found.picks_P, found.dropped_P).tolist() == rates
    assert drop_rate_by_position(found.picks_P, found.dropped_P, parts=2).tolist() == halves
    assert drop_rate(layer.chosen_M, 4, layer.dropped) == sum(halves) / 2


def test_the_recorder_counts_drops_of_a_model_and_leaves_padding_out() -> None:
    model = tiny_model(capacity=CAPACITY)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with record(model) as trace:
        context = model(IDS, attention_mask=mask, output_routing=True).routing
    assert tuple(trace.layers) == LAYERS
    for index, layer in trace.layers.items():
        dropped_BTK = context.records[index].dropped_TK.view(2, 10, TOP_K)
        assert layer.dropped == dropped_BTK.sum() > 0
        assert layer.chosen_M.sum() == 16 * TOP_K
        assert layer.load_N.sum() == 16 * TOP_K - layer.dropped
        assert layer.tokens == 16
        found = layer.domain_positions[""]
        # The first real token of the padded sequence is at position 0.
        expected_P = dropped_BTK[1].sum(-1)
        expected_P[:6] += dropped_BTK[0, 4:].sum(-1)
        assert found.picks_P.tolist() == [2 * TOP_K] * 6 + [TOP_K] * 4
        assert found.dropped_P.tolist() == expected_P.tolist()
        assert layer.unserved == dropped_BTK.all(-1).sum()


def test_domains_have_their_own_curves() -> None:
    model = tiny_model(capacity=CAPACITY)
    with record(model, keep="counts") as trace:
        with trace.domain("short"):
            model(IDS[:, :4])
        with trace.domain("long"):
            model(IDS)
    layer = trace.layers[1]
    lengths = {name: len(found.picks_P) for name, found in layer.domain_positions.items()}
    assert lengths == {"short": 4, "long": 10}
    assert layer.dropped == sum(int(found.dropped_P.sum()) for found in layer.domain_positions.values())
    assert layer.domain_chosen["short"].sum() == 8 * TOP_K


def test_without_a_capacity_nothing_is_kept_by_position() -> None:
    model = tiny_model(router={"type": "null_experts", "top_k": 3, "num_null": 4})
    with record(model, keep="counts") as trace:
        model(IDS)
    layer = trace.layers[1]
    assert (layer.dropped, layer.domain_positions) == (0, {})
    assert (layer.num_null, len(layer.chosen_M), int(layer.chosen_M.sum())) == (4, 10, 60)
    assert null_share(layer.chosen_M, layer.num_experts) == pytest.approx(1 - int(layer.load_N.sum()) / 60)
