"""Metrics of the worked table R: 8 tokens, 4 experts, 2 picks (`tests.trace.routing_logs`)."""

from __future__ import annotations

import math

import pytest
import torch
from tests.trace.routing_logs import Q_PICKS, Log, columns, log_of, table_r

from moesaic.layer import CapacityConfig
from moesaic.trace import (
    apply_capacity,
    coactivation_table,
    count,
    domain_specialisation,
    drop_rates,
    gini,
    group_distribution,
    group_information,
    load_balance,
    noise_floor,
    router_saturation,
    routing_deviation,
    token_clusters,
    vocabulary_specialisation,
)
from moesaic.trace.counts.routing import TABLES
from moesaic.trace.metrics import deviation_bound

R = count(table_r(batch=3), tables=TABLES).layer(0)
close = pytest.approx


def exactly(*values: float):
    return pytest.approx(list(values), abs=1e-6)


def test_load():
    both, first = load_balance(R), load_balance(R, first=True)
    assert both.table["value"].tolist() == [0.75, 0.625, 0.375, 0.25]
    assert first.table["value"].tolist() == [0.375, 0.375, 0.25, 0]
    assert both.value == 0.5  # 6 picks over a mean of 4
    assert both.values["gini"] == gini(torch.tensor([6, 5, 3, 2])) == close(0.21875)
    assert first.values["unused"] == 1
    assert both.values["entropy"] == close(1.305096 / math.log(4), abs=1e-6)


def test_domain_specialisation_is_the_load_of_the_domain():
    both, first = domain_specialisation(R), domain_specialisation(R, first=True)
    assert both.matrix_GM.tolist() == [[0.75, 0.625, 0.375, 0.25]]
    assert first.matrix_GM.tolist() == [[0.375, 0.375, 0.25, 0]]
    assert (both.reference, first.reference) == (0.5, 0.25)
    assert both.matrix_GM.sum().item() == 2


def test_routing_deviation():
    found = routing_deviation(R)
    assert group_distribution(R, "token").matrix_GM.tolist() == [
        [0.5, 0.375, 0, 0.125],
        [0.25, 0, 0.5, 0.25],
        [0.25, 0.5, 0.25, 0],
    ]
    assert found.table["label"].tolist() == [5, 7, 9]
    assert found.table["value"].tolist() == exactly(0.197642, 0.176777, 0.176777)
    assert found.value == close(0.183732, abs=1e-6)
    assert found.values["weighted"] == close(0.187210, abs=1e-6)
    assert found.values["bound"] == 0.25
    assert found.values["all"] == close(0.098821, abs=1e-6)
    assert found.table["relative"].tolist() == exactly(0.116927, 0.237993, 0.132583)
    assert found.values["relative"] == close(0.162501, abs=1e-6)


def test_information():
    both, first = group_information(R), group_information(R, first=True)
    assert both.values["entropy"] == close(1.305096, abs=1e-6)
    assert both.values["conditional"] == close(1.007018, abs=1e-6)
    assert both.value == close(0.228396, abs=1e-6)
    assert first.values["entropy"] == close(1.082196, abs=1e-6)
    assert first.values["conditional"] == close(0.281168, abs=1e-6)
    assert first.value == close(0.740188, abs=1e-6)


def test_vocabulary_specialisation():
    found = vocabulary_specialisation(R)
    assert found.table["count"].tolist() == [1, 1, 1, 0]  # 5 goes to e0, 9 to e1, 7 to e2
    assert found.table["value"][:3].tolist() == [0.75, 1, 1]
    assert math.isnan(found.table["value"][3])
    assert found.value == close(0.916667, abs=1e-6)
    assert vocabulary_specialisation(R, weighting="occurrences").value == 0.875
    following = vocabulary_specialisation(R, ids="next")
    assert following.table["tokens"].tolist() == [4, 0, 3, 0]  # 7 and 9 to e0, 5 to e2
    assert following.table["value"][2].item() == close(2 / 3)
    assert following.value == close(0.722222, abs=1e-6)


def test_vocabulary_specialisation_of_both_picks():
    found = vocabulary_specialisation(R, first=False)
    assert found.value == 1
    assert found.table["value"].nansum().item() == found.table["count"].count_nonzero().item()
    assert vocabulary_specialisation(R, first=False, denominator="picks").value == 0.5


def test_coactivation():
    found = coactivation_table(R)
    expected = [[math.nan, 4, 1, 1], [4, math.nan, 1, 0], [1, 1, math.nan, 1], [1, 0, 1, math.nan]]
    expected_MM = torch.tensor(expected, dtype=torch.float64) / torch.tensor([6, 5, 3, 2]).unsqueeze(-1)
    torch.testing.assert_close(found.matrix_GM, expected_MM, equal_nan=True)
    assert found.table["row_sum"].tolist() == exactly(1, 1, 1, 1)
    assert found.values["row_sum_error"] < 1e-12


def test_adjacent_pairs_miss_the_others():
    log = log_of(columns([1]), {0: torch.tensor([[0, 1, 2]])}, 4)
    layer = count(log, tables=TABLES).layer(0)
    assert coactivation_table(layer).matrix_GM[0, 2] == 1
    adjacent = coactivation_table(layer, adjacent_only=True)
    assert adjacent.matrix_GM[0, 2] == 0
    assert adjacent.matrix_GM[0, 1] == 1
    assert adjacent.conventions["adjacent_only"] is True


@pytest.mark.parametrize("batch", [None, 3])
def test_saturation(batch: int | None):
    found = router_saturation(table_r(batch), table_r(picks=Q_PICKS))[0]
    assert (found.value, found.values["corrected"]) == (0.75, 0.5)
    assert (found.values["rank_1"], found.values["rank_1_corrected"]) == (0.25, 0)
    assert found.reference == 0.5
    itself = router_saturation(table_r(batch), table_r())[0]
    assert (itself.value, itself.values["rank_1"]) == (1, 1)


RANK, TOKEN = "rank_first", "token_first"


@pytest.mark.parametrize(
    ("factor", "order", "rates"),
    [
        (1.0, RANK, [0, 0, 0.5, 0, 0, 0, 0.5, 0.5]),
        (1.0, TOKEN, [0, 0, 0, 0, 0, 0, 0.5, 1]),
        (0.75, RANK, [0.5, 0, 0.5, 0, 0.5, 0, 0.5, 0.5]),
        (0.75, TOKEN, [0, 0, 0, 0, 0, 0.5, 1, 1]),
        (0.5, RANK, [0.5, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 1]),
    ],
)
def test_capacity_applied_afterwards(factor: float, order, rates: list[float]):
    found = drops_of(table_r(batch=3), factor, order)
    assert found.table["value"].tolist() == rates
    assert found.value == sum(rates) / 8
    assert found.value * 16 == {1.0: 3, 0.75: 5, 0.5: 8}[factor]


def test_the_order_moves_drops_not_their_number():
    rank, token = (drops_of(table_r(), 1.0, order, parts=2) for order in (RANK, TOKEN))
    assert rank.table["value"].tolist() == [0.125, 0.25]
    assert token.table["value"].tolist() == [0, 0.375]
    assert rank.value == token.value == 0.1875
    assert (rank.values["unserved"], token.values["unserved"]) == (0, 1 / 8)


def drops_of(log: Log, factor: float, order, parts: int | None = None):
    capacity = CapacityConfig(factor=factor, minimum=0, choice_order=order)
    return drop_rates(count(apply_capacity(log, capacity)).layer(0), parts=parts)


def test_bounds_and_floors():
    assert deviation_bound(2, 32) == close(0.121031, abs=1e-6)
    floor = noise_floor(torch.tensor([448, 175, 128]), 2, 32)
    assert floor.tolist() == pytest.approx([0.0057, 0.0091, 0.010698], abs=5e-5)
    assert floor[2].item() == close(0.010698, abs=1e-6)


def test_tokens_of_an_expert():
    by_count = token_clusters(R, top=2)
    assert [(item.token_id, item.count) for item in by_count[0]] == [(5, 4), (7, 1)]
    # Of the 3 picks of expert 2, two are of id 7, a quarter of the tokens.
    lift = token_clusters(R, by="lift")[2][0]
    assert (lift.token_id, lift.count, lift.lift) == (7, 2, close(8 / 3))
