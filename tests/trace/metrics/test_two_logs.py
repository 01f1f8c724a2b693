"""Metrics of two logs or counts: saturation of sets of unequal size, change, context, matching."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.trace.routing_logs import Log, columns, log_of, random_log, table_r

from moesaic.errors import ConfigError, TraceError
from moesaic.trace import (
    context_change,
    count,
    distribution_change,
    match_experts,
    renumbered,
    router_saturation,
    saturation_over,
)
from moesaic.trace.metrics.saturation import overlap


def test_sets_of_unequal_size_count_over_the_larger():
    one = np.array([[0, 1, 2], [0, -1, -1], [-1, -1, -1], [-1, -1, -1], [3, 4, -1]])
    other = np.array([[2, 0, -1], [0, 1, -1], [-1, -1, -1], [1, -1, -1], [4, 3, -1]])
    assert overlap(one, other).tolist() == [2 / 3, 1 / 2, 1, 0, 1]


def test_saturation_band_rests_on_documents():
    log, final = (random_log(seed, lengths=(20,) * 30, layers=(1,)) for seed in (0, 0))
    other = random_log(1, lengths=(20,) * 30, layers=(1,))
    first = next(iter(log.rows()))
    # Half of the documents are routed as in the end, the others at random.
    changed = torch.where(
        (first.tokens.document_T % 2 == 0).unsqueeze(-1), first.choice_TK, next(iter(other.rows())).choice_TK
    )
    mixed = log_of(first.tokens, {1: changed}, 6)
    found = router_saturation(mixed, final)[1]
    assert found.band.low < found.value < found.band.high
    assert found.band.high - found.band.low > 0.15
    same = router_saturation(log, final)[1]
    assert (same.value, same.band.low, same.band.high) == (1, 1, 1)


def test_saturation_over_checkpoints():
    final = random_log(0, layers=(1, 3))
    found = saturation_over({200: final, 10: random_log(0, layers=(1, 3), batch=7)}, final, layers=[3])
    assert list(found) == [10, 200]
    assert found[10].keys() == {3}
    assert found[10][3].value == 1


def test_special_ids_are_left_out_of_saturation():
    tokens = columns([1, 2, 1, 2])
    one, other = (log_of(tokens, {0: torch.tensor(picks)}, 4) for picks in ([[0], [1], [2], [3]], [[0], [0], [2], [0]]))
    assert router_saturation(one, other)[0].value == 0.5
    assert router_saturation(one, other, exclude=[2])[0].value == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (random_log(0, num_experts=7), "other layers or experts"),
        (random_log(0, layers=(1,)), "other layers or experts"),
        (random_log(5), "different tokens"),
        (random_log(0, lengths=(17, 40)), "lacks 6 rows"),
        (random_log(0, first_document=9), "not of the same documents"),
    ],
)
def test_traces_that_do_not_fit_are_refused(other: Log, message: str):
    with pytest.raises(TraceError, match=message):
        router_saturation(random_log(0), other)


def test_traces_of_different_tokenizers_are_refused():
    logs = [random_log(0), random_log(0)]
    for log, name in zip(logs, ("a", "b"), strict=True):
        log.header = log.header.model_copy(update={"tokenizer": name})
    with pytest.raises(TraceError, match="different tokenizers"):
        router_saturation(*logs)


def test_change_of_distributions():
    ids = columns([5, 5, 7, 7])
    one, other = (
        count(log_of(ids, {0: torch.tensor(picks).unsqueeze(-1)}, 4)).layer(0) for picks in ([0, 0, 1, 1], [0, 1, 2, 3])
    )
    found = distribution_change(one, other)
    # 5: (1, 0) against (1/2, 1/2); 7: nothing in common.
    half = 0.5 * math.log2(1 / 0.75) + 0.5 * (0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25))
    assert found.table["jensen_shannon"].tolist() == pytest.approx([half, 1])
    assert found.table["cosine"].tolist() == pytest.approx([1 / math.sqrt(2), 0])
    assert found.value == pytest.approx((half + 1) / 2)
    assert distribution_change(one, other, labels=[5], measure="cosine").value == pytest.approx(1 / math.sqrt(2))
    assert distribution_change(one, one).value == 0
    with pytest.raises(ConfigError, match="group"):
        distribution_change(one, other, labels=[8])


@pytest.mark.parametrize("batch", [None, 1, 4])
def test_context_change(batch: int | None):
    # Two documents; the first token of one and the second of the other are replaced.
    lengths = [6, 3]
    before = log_of(columns([1, 5, 6, 7, 8, 9, 5, 2, 6], lengths), {0: torch.arange(9).unsqueeze(-1)}, 12, batch=batch)
    choice_T1 = torch.tensor([0, 1, 2, 10, 4, 11, 6, 7, 0]).unsqueeze(-1)
    after = log_of(columns([3, 5, 6, 7, 8, 9, 5, 4, 6], lengths), {0: choice_T1}, 12)
    found = context_change(before, after)[0]
    assert found.table["label"].tolist() == [1, 2, 4]  # distances 1; 2 and 3; 4 and 5
    assert found.table["count"].tolist() == [2, 2, 2]
    assert found.table["value"].tolist() == [0.5, 0.5, 0.5]
    assert (found.value, found.values["rank_1"], found.values["tokens"]) == (0.5, 0.5, 6)
    assert found.values["before"] == 0
    assert found.reference == pytest.approx(11 / 12)
    by_token = context_change(before, after, by="token", exclude=[7])[0]
    assert by_token.table["label"].tolist() == [5, 6, 8, 9]
    assert by_token.table["value"].tolist() == [0, 0.5, 0, 1]


def test_context_change_needs_a_change():
    with pytest.raises(TraceError, match="same tokens"):
        context_change(table_r(), table_r())


def test_experts_of_two_runs_are_matched():
    ids_T = torch.arange(12).repeat(30)
    generator = torch.Generator().manual_seed(0)
    table_VN = torch.rand(12, 6, generator=generator) * 3
    noise = torch.rand(2, 360, 6, generator=generator)
    log, other = (log_of(columns(ids_T), {0: (table_VN[ids_T] + part).topk(2).indices}, 6) for part in noise)
    new_N = torch.tensor([3, 5, 0, 1, 4, 2])
    shuffled = renumbered(log, {0: new_N})
    assert router_saturation(shuffled, other)[0].value < 0.6
    match = match_experts(count(shuffled).layer(0), count(other).layer(0))
    assert match.expert_N[new_N].tolist() == list(range(6))
    assert match.similarity_N.min() > 0.8
    back = renumbered(shuffled, {0: match.expert_N})
    assert router_saturation(back, other)[0].value == router_saturation(log, other)[0].value > 0.7


def test_unused_experts_are_matched_without_a_similarity():
    layer = count(log_of(columns([1, 2]), {0: torch.tensor([[0], [2]])}, 4, num_null=1)).layer(0)
    match = match_experts(layer, layer)
    assert sorted(match.expert_N.tolist()) == [0, 1, 2, 3]
    assert match.expert_N[[0, 2]].tolist() == [0, 2]
    assert match.similarity_N[[0, 2]].tolist() == pytest.approx([1, 1])
    assert match.similarity_N[[1, 3]].isnan().all()


def test_renumbering_keeps_nulls_and_nothing():
    choice_TK = torch.tensor([[0, 2], [1, -1], [2, 1]])
    log = log_of(columns([1, 2, 3]), {0: choice_TK}, 2, num_null=1)
    rows = next(iter(renumbered(log, {0: torch.tensor([1, 0])}).rows()))
    assert rows.choice_TK.tolist() == [[1, 2], [0, -1], [2, 0]]
    with pytest.raises(ConfigError, match="no permutation"):
        renumbered(log, {0: torch.tensor([1, 1])})
    with pytest.raises(ConfigError, match="not a layer"):
        renumbered(log, {4: torch.tensor([1, 0])})
