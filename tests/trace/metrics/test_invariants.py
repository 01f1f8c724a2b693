"""What holds for every log: bounds, renumbering, order of sequences, total drops, noise floors, hash routers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trace.routing_logs import Log, columns, log_of, random_log

from moesaic.layer import CapacityConfig
from moesaic.trace import (
    apply_capacity,
    coactivation_table,
    count,
    domain_specialisation,
    drop_rates,
    group_information,
    load_balance,
    noise_floor,
    renumbered,
    router_saturation,
    routing_deviation,
    vocabulary_specialisation,
)
from moesaic.trace.metrics import deviation_bound
from moesaic.trace.metrics.information import permuted_entropy

GROUPS = ("token", "next", "position", "domain", "turn")
seeds, picks = st.integers(0, 999), st.integers(1, 4)


def numbers(log: Log) -> list[float]:
    """Every number that must not depend on the experts' numbers or the order of sequences."""
    layer = count(log).layer(1)
    found = [
        value
        for group in GROUPS
        for first in (False, True)
        for metric in (routing_deviation, group_information)
        for result in [metric(layer, group, first=first)]
        for value in (result.value, result.reference, *result.values.values())
    ]
    found += [load_balance(layer).value, domain_specialisation(layer).value, coactivation_table(layer).value]
    found += [vocabulary_specialisation(layer, ids=ids, chance=False).value for ids in ("token", "next")]
    return [value for value in found if value is not None]


@given(seeds, picks)
@settings(max_examples=8)
def test_numbers_of_experts_do_not_matter(seed: int, top_k: int):
    log = random_log(seed, top_k=top_k, drops=True, domains=(0, 1, 1))
    new_N = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    other = renumbered(log, {1: new_N, 3: new_N})
    assert numbers(other) == pytest.approx(numbers(log), abs=1e-9, nan_ok=True)
    before, after = (drop_rates(count(each).layer(1)).table["value"] for each in (log, other))
    torch.testing.assert_close(before, after, equal_nan=True)
    last = random_log(seed, top_k=top_k, layers=(1, 3), domains=(0, 1, 1), lengths=(17, 40, 3))
    both = router_saturation(other, renumbered(last, {1: new_N, 3: new_N}))[1]
    assert both.value == pytest.approx(router_saturation(log, last)[1].value)


@given(seeds, picks)
@settings(max_examples=8)
def test_order_of_sequences_does_not_matter(seed: int, top_k: int):
    log = random_log(seed, top_k=top_k, drops=True, domains=(0, 1, 1))
    cuts = [slice(57, 60), slice(0, 17), slice(17, 57)]
    other = Log(log.header, [rows[cut] for cut in cuts for rows in log.rows()])
    assert numbers(other) == pytest.approx(numbers(log), abs=1e-9, nan_ok=True)
    capacity = CapacityConfig(factor=0.7, minimum=0)
    for policy in (log, other):
        found = drop_rates(count(apply_capacity(policy, capacity)).layer(1)).table["value"]
        torch.testing.assert_close(found, drop_rates(count(apply_capacity(log, capacity)).layer(1)).table["value"])


@given(seeds, picks, st.sampled_from([0, 2]), st.booleans())
@settings(max_examples=10)
def test_bounds(seed: int, top_k: int, num_null: int, first: bool):
    layer = count(random_log(seed, top_k=top_k, num_null=num_null, domains=(0, 1, 1))).layer(1)
    bound = deviation_bound(1 if first else top_k, 6 + num_null)
    for group in GROUPS:
        found = routing_deviation(layer, group, first=first)
        assert 0 <= found.table["value"].min() <= found.table["value"].max() <= bound + 1e-12
        information = group_information(layer, group, first=first)
        assert -1e-12 <= information.value <= 1 + 1e-12
        assert information.reference <= 1 + 1e-12
    for denominator, most in (("occurrences", 1), ("picks", 1 / (1 if first else top_k))):
        found = vocabulary_specialisation(layer, first=first, denominator=denominator, chance=False)
        assert 0 < found.value <= most + 1e-12
    table = coactivation_table(layer)
    assert top_k == 1 or table.values["row_sum_error"] < 1e-9


@given(seeds, picks, st.sampled_from([0.3, 0.5, 1.0, 1.5, 3.0]), st.sampled_from(["token_first", "rank_first"]))
@settings(max_examples=10)
def test_drops_are_what_exceeds_the_capacity(seed: int, top_k: int, factor: float, order):
    """In every sequence: sum over experts of max(0, load - C), whoever is dropped; never more with more slots."""
    lengths = (17, 40, 3)
    log = random_log(seed, top_k=top_k, lengths=lengths, batch=13)
    dropped = []
    for cf in (factor, 2 * factor):
        capacity = CapacityConfig(factor=cf, minimum=0, choice_order=order)
        limited = apply_capacity(log, capacity)
        found = count(limited).layer(1)
        expected, start = 0, 0
        choice_TK = torch.cat([rows.choice_TK for rows in log.rows([1])])
        for length in lengths:
            load_N = torch.bincount(choice_TK[start : start + length].reshape(-1), minlength=6)
            slots = capacity.slots(torch.tensor(length), 6, top_k, training=True)
            expected += int((load_N - slots).clamp(min=0).sum())
            start += length
        assert found.dropped == expected
        dropped.append(found.dropped)
        if order == "token_first":
            # A token uses an expert once, so C earlier tokens can't have filled it.
            slots = int(capacity.slots(torch.tensor(17), 6, top_k, training=True))
            rates = drop_rates(found, parts=None).table
            first_document = next(iter(count(Log(log.header, _first(limited, 17))).layer(1).drops.values()))
            assert not first_document.dropped_G[first_document.label_G < slots].any()
            assert len(rates["value"]) == 40
    assert dropped[1] <= dropped[0]


def _first(log, tokens: int):
    """Rows of the first document."""
    return [rows[rows.tokens.document_T == 0] for rows in log.rows()]


@given(seeds)
@settings(max_examples=10)
def test_first_choices_at_early_places_never_drop_by_rank(seed: int):
    log = random_log(seed, lengths=(40,), layers=(1,))
    capacity = CapacityConfig(factor=0.6, minimum=0, choice_order="rank_first")
    slots = int(capacity.slots(torch.tensor(40), 6, 2, training=True))
    rows = next(iter(apply_capacity(log, capacity).rows()))
    assert not rows.dropped_TK[:slots, 0].any()


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_capacity_of_a_batch_lets_late_sequences_lose(scope):
    log = random_log(0, lengths=(30,) * 8, layers=(1,), domains=tuple(range(8)), batch=7)
    capacity = CapacityConfig(factor=0.8, minimum=0, scope=scope)
    limited = apply_capacity(log, capacity, batch=4 if scope == "batch" else None)
    rates = drop_rates(count(limited).layer(1), by="domain").table["value"]
    if scope == "batch":
        # The last of four sequences finds what the others left.
        assert rates[[0, 1, 4, 5]].sum() == 0
        assert (rates[[3, 7]] > 0.5).all()
    else:
        assert (rates > 0.1).all()


def test_capacity_of_ample_slots_drops_nothing():
    log = random_log(0, lengths=(30, 9))
    found = count(apply_capacity(log, CapacityConfig(factor=1000))).layer(1)
    assert drop_rates(found).table["value"].tolist() == [0] * 30
    assert found.limited


def _uniform(tokens: int, num_experts: int, top_k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices


@pytest.mark.parametrize(("groups", "size", "top_k"), [(150, 128, 2), (300, 40, 1), (100, 200, 8)])
def test_a_random_router_is_at_the_floor(groups: int, size: int, top_k: int):
    ids_T = torch.arange(groups).repeat(size)
    log = log_of(columns(ids_T), {0: _uniform(len(ids_T), 32, top_k, seed=1)}, 32)
    found = routing_deviation(count(log).layer(0))
    assert found.value == pytest.approx(found.reference, rel=0.05)
    assert found.reference == pytest.approx(noise_floor(torch.tensor([size]), top_k, 32).item())
    assert found.values["excess"] < 0.3 * found.reference
    assert found.values["relative"] == pytest.approx(found.reference, rel=0.05)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_permutation_null_is_that_of_shuffled_labels(top_k: int):
    # Skewed sizes and a skewed load.
    generator = torch.Generator().manual_seed(0)
    ids_T = (torch.rand(3000, generator=generator) ** 3 * 40).long()
    scores_TN = torch.rand(3000, 10, generator=generator) + torch.linspace(0, 0.5, 10)
    choice_TK = scores_TN.topk(top_k).indices
    found = group_information(count(log_of(columns(ids_T), {0: choice_TK}, 10)).layer(0))
    shuffled = []
    for seed in range(20):
        order = torch.randperm(3000, generator=torch.Generator().manual_seed(seed))
        layer = count(log_of(columns(ids_T[order]), {0: choice_TK}, 10)).layer(0)
        shuffled.append(group_information(layer).value)
    spread = torch.tensor(shuffled).std().item()
    assert found.reference == pytest.approx(sum(shuffled) / 20, abs=4 * spread / math.sqrt(20))
    assert 0 < found.reference < 0.1


def test_the_expansion_for_large_groups_meets_the_exact_null(monkeypatch):
    ids_T = torch.arange(20).repeat(140)  # 35 of each column in a group
    table = count(log_of(columns(ids_T), {0: _uniform(2800, 8, 2, seed=3)}, 8)).layer(0).group("token")
    expanded = permuted_entropy(table)
    monkeypatch.setattr("moesaic.trace.metrics.information._MANY", 1e9)
    exact = permuted_entropy(table)
    assert math.log(8) - expanded == pytest.approx(math.log(8) - exact, rel=0.01)
    assert expanded != exact


def test_saturation_of_independent_routers_is_chance():
    ids = columns(torch.zeros(4000, dtype=torch.int64))
    logs = [log_of(ids, {0: _uniform(4000, 16, 4, seed)}, 16) for seed in (0, 1)]
    found = router_saturation(*logs)[0]
    # The overlap of a token is hypergeometric: K draws, K of M marked.
    sigma = math.sqrt(4 * 0.25 * 0.75 * 12 / 15 / 4000) / 4
    assert found.value == pytest.approx(0.25, abs=3 * sigma)
    assert found.values["corrected"] == pytest.approx(0, abs=4 * sigma)


def test_a_hash_router():
    """Expert is a function of the id: all that tokens can tell, and nothing that positions do."""
    generator = torch.Generator().manual_seed(0)
    ids_T = (torch.rand(4096, generator=generator) ** 2 * 50).long()
    table_VK = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(50)])
    log = log_of(columns(ids_T, [64] * 64), {0: table_VK[ids_T]}, 8)
    layer = count(log).layer(0)
    assert group_information(layer, first=True).value == 1
    deviation = routing_deviation(layer)
    assert deviation.table["value"].min().item() == pytest.approx(deviation_bound(2, 8))
    assert router_saturation(log, log)[0].value == 1
    position = group_information(layer, "position", first=True)
    assert position.value == pytest.approx(position.reference, rel=0.15)
    # Far above the floor of a uniform router, though positions say nothing: skewed ids load experts unevenly.
    spread = routing_deviation(layer, "position")
    assert spread.value > 1.2 * spread.reference
    assert spread.values["relative"] < spread.value


def test_all_experts_for_every_token():
    choice_TK = torch.stack([torch.randperm(4) for _ in range(20)])
    log = log_of(columns(torch.arange(20) % 3), {0: choice_TK}, 4)
    layer = count(log).layer(0)
    assert routing_deviation(layer).value == pytest.approx(0, abs=1e-12)
    found = router_saturation(log, log_of(columns(torch.arange(20) % 3), {0: choice_TK.flip(0)}, 4))[0]
    assert found.value == 1
    assert math.isnan(found.values["corrected"])


def test_one_expert_for_every_token_has_no_pairs():
    layer = count(log_of(columns([1, 2]), {0: torch.tensor([[0], [1]])}, 4)).layer(0)
    table = coactivation_table(layer)
    assert math.isnan(table.value)
    assert table.table["row_sum"][:2].tolist() == [0, 0]
    assert table.table["row_sum"][2:].isnan().all()


def test_dead_experts_are_undefined_not_zero():
    layer = count(log_of(columns([1, 2]), {0: torch.tensor([[0, 1], [1, 0]])}, 4)).layer(0)
    table = coactivation_table(layer)
    assert table.matrix_GM[2:].isnan().all()
    assert table.table["value"][2:].isnan().all()
    assert table.value == 1
    assert load_balance(layer).values["unused"] == 2
    assert vocabulary_specialisation(layer).table["value"][2:].isnan().all()
