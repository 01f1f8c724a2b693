from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trace.routing_logs import Log, columns, log_of, random_log, same_counts, table_r

from moesaic.errors import ConfigError
from moesaic.trace import count
from moesaic.trace.counts.routing import TABLES


def test_table_r():
    counts = count(table_r(), tables=TABLES)
    layer = counts.layer(0)
    assert counts.documents == 1
    assert layer.tokens == 8
    assert layer.load_KM.tolist() == [[3, 3, 2, 0], [3, 2, 1, 2]]
    assert layer.load_N.tolist() == [6, 5, 3, 2]
    assert layer.ran_K1.tolist() == [0, 0, 8]
    assert layer.pairs_MM.tolist() == [[6, 4, 1, 1], [4, 5, 1, 0], [1, 1, 3, 1], [1, 0, 1, 2]]
    token = layer.group("token")
    assert (token.label_G.tolist(), token.tokens_G.tolist()) == ([5, 7, 9], [4, 2, 2])
    assert token.table_GM().tolist() == [[4, 3, 0, 1], [1, 0, 2, 1], [1, 2, 1, 0]]
    assert token.table_GM(first=True).tolist() == [[3, 1, 0, 0], [0, 0, 2, 0], [0, 2, 0, 0]]
    # Seven pairs of neighbours: the last token has no next one, the first none before it.
    following = layer.group("next")
    assert (following.label_G.tolist(), following.tokens_G.tolist()) == ([5, 7, 9], [3, 2, 2])
    assert following.table_GM(first=True).tolist() == [[0, 1, 2, 0], [1, 1, 0, 0], [2, 0, 0, 0]]
    before = layer.group("previous")
    assert (before.label_G.tolist(), before.tokens_G.tolist()) == ([5, 7, 9], [3, 2, 2])
    assert before.table_GM(first=True).tolist() == [[0, 2, 1, 0], [2, 0, 0, 0], [0, 1, 1, 0]]
    assert layer.group("position").table_GM()[1].tolist() == [0, 0, 1, 1]
    assert layer.drops["place"].sequences_G.tolist() == [1] * 8


@given(st.integers(0, 99), st.integers(1, 61), st.booleans())
@settings(max_examples=25)
def test_batches_change_nothing(seed: int, batch: int, nulls: bool):
    def make(size: int | None) -> Log:
        return random_log(seed, batch=size, num_null=3 * nulls, drops=True, domains=(0, 1, 1), top_k=3)

    settings = {"tables": TABLES, "positions": 16, "blocks": 2}
    same_counts(count(make(batch), **settings), count(make(None), **settings))


@given(st.integers(0, 99))
@settings(max_examples=15)
def test_counts_of_disjoint_texts_are_added(seed: int):
    lengths, domains = (17, 40, 3, 9), (0, 1, 1, 0)
    whole = random_log(seed, lengths=lengths, domains=domains, drops=True)
    rows = list(whole.rows())
    parts = [Log(whole.header, [part[cut] for part in rows]) for cut in (slice(0, 57), slice(57, None))]
    settings = {"tables": TABLES, "positions": 8}
    first, second = (count(part, **settings) for part in parts)
    same_counts(first + second, count(whole, **settings))
    assert (first + second).documents == 4


def test_domains_are_added_by_name():
    ids, choice = [1, 2], {0: torch.tensor([[0], [1]])}
    one = count(log_of(columns(ids, [2], domain=[1]), choice, 2, domains=("", "code"), dropped={0: choice[0] > 9}))
    other = count(log_of(columns(ids, [2], domain=[1]), choice, 2, domains=("", "prose"), dropped={0: choice[0] > 9}))
    both = one + other + one
    assert both.header.domains == ("", "code", "prose")
    domain = both.layer(0).group("domain")
    assert (domain.label_G.tolist(), domain.tokens_G.tolist()) == ([1, 2], [4, 2])
    assert both.layer(0).group("block").label_G.tolist() == [64, 128]
    assert both.layer(0).drops["place"].by("domain").tokens_G.tolist() == [4, 2]


def test_what_was_counted_otherwise_is_not_added():
    one = count(table_r())
    with pytest.raises(ConfigError, match="tables"):
        one + count(table_r(), tables=("token",))
    with pytest.raises(ConfigError, match="excluded"):
        one + count(table_r(), exclude=[5])
    with pytest.raises(ConfigError, match="layers"):
        one + count(random_log(0))


def test_special_tokens_are_left_out_but_keep_their_places():
    log = log_of(columns([5, 7, 5, 9], [2, 2]), {0: torch.tensor([[0, 1], [2, 3], [0, 1], [1, 2]])}, 4)
    layer = count(log, exclude=[5], tables=TABLES).layer(0)
    assert layer.tokens == 2
    assert layer.load_N.tolist() == [0, 1, 2, 1]
    assert layer.ran_K1.tolist() == [0, 0, 2]
    assert layer.group("token").label_G.tolist() == [7, 9]
    assert layer.group("position").label_G.tolist() == [1]
    assert "next" not in layer.groups
    assert layer.pairs_MM.diagonal().tolist() == [0, 1, 2, 1]
    place = layer.drops["place"]
    assert (place.by("label").sequences_G.tolist(), place.by("label").tokens_G.tolist()) == ([2, 2], [0, 2])


def test_neighbours_across_batches_of_generation():
    # Two documents, a token of each in turn, as a cache decodes them.
    choice_TK = torch.arange(8).view(8, 1)
    tokens = columns([1, 2, 3, 4, 5, 6, 7, 8], [4, 4])
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    log = log_of(tokens[order], {0: choice_TK[order]}, 8, batch=2)
    layer = count(log, tables=TABLES).layer(0)
    assert layer.group("next").label_G.tolist() == [2, 3, 4, 6, 7, 8]
    assert layer.group("next").column_P.tolist() == [0, 1, 2, 4, 5, 6]
    assert layer.group("previous").label_G.tolist() == [1, 2, 3, 5, 6, 7]
    assert layer.group("previous").column_P.tolist() == [1, 2, 3, 5, 6, 7]


def test_wide_tables_forget_rare_ids_for_good_and_say_so():
    ids = [0] * 50 + [1] * 30 + list(range(2, 40)) + [0] * 50 + [39]
    choice_TK = torch.arange(len(ids)).view(-1, 1) % 2
    log = log_of(columns(ids), {0: choice_TK}, 2, batch=10)
    exact = count(log).layer(0).group("token")
    few = count(log, max_pairs=12).layer(0).group("token")
    assert 2 <= len(few) < 12
    assert (few.label_G[:2].tolist(), few.tokens_G[:2].tolist()) == ([0, 1], [100, 30])
    assert torch.equal(few.table_GM()[:2], exact.table_GM()[:2])
    assert few.forgotten == len(ids) - int(few.tokens_G.sum())
    assert len(few) + len(few.forgotten_F) == 40
    # What one log forgot is not half known after adding another.
    both = few + exact
    assert torch.equal(both.label_G, few.label_G)
    assert int(both.tokens_G.sum()) + both.forgotten == 2 * len(ids)


def test_long_documents_share_buckets():
    log = random_log(0, lengths=[100, 37], layers=[0])
    layer = count(log, positions=8).layer(0)
    position = layer.group("position")
    assert (position.width, position.label_G.tolist()) == (16, [0, 16, 32, 48, 64, 80, 96])
    assert position.tokens_G.tolist() == [32, 32, 21, 16, 16, 16, 4]
    place = layer.drops["place"].by("label")
    assert (place.width, place.sequences_G.tolist()) == (16, [2, 2, 2, 1, 1, 1, 1])
    quarters = place.by("label", parts=4)
    assert (quarters.label_G.tolist(), quarters.sequences_G.tolist()) == ([0, 1, 2, 3], [2, 2, 1, 1])
    assert int(quarters.tokens_G.sum()) == 137


def test_predicted_ids_go_with_their_rows():
    log = table_r(batch=3)
    predicted = count(log, predicted_T=torch.tensor([1, 1, 1, 1, 2, 2, 2, 2])).layer(0).group("predicted")
    assert predicted.table_GM(first=True).tolist() == [[2, 1, 1, 0], [1, 2, 1, 0]]
    with pytest.raises(ConfigError, match="predicted_T"):
        count(log, predicted_T=torch.ones(7))


def test_flow_between_layers_of_unequal_batches():
    log = random_log(3, layers=(1, 3))
    first, second = list(log.rows())
    rows = [first[:20], second[:7], second[7:50], first[20:], second[50:]]
    cut = count(Log(log.header, rows))
    flow = cut.flow[1, 3]
    assert torch.equal(flow.table_GM(), count(log).flow[1, 3].table_GM())
    expected = torch.zeros(6, 6, dtype=torch.int64)
    for a, b in zip(first.choice_TK[:, 0].tolist(), second.choice_TK[:, 0].tolist(), strict=True):
        expected[a, b] += 1
    assert torch.equal(flow.table_GM(), expected)


@pytest.mark.parametrize(
    ("name", "value"), [("tables", ["tokens"]), ("layers", [7]), ("positions", 0), ("blocks", 0), ("max_pairs", 0)]
)
def test_settings_out_of_range_are_named(name: str, value):
    with pytest.raises(ConfigError, match=name):
        count(table_r(), **{name: value})


def test_what_was_not_counted_is_named():
    counts = count(table_r(), tables=("token",))
    with pytest.raises(ConfigError, match="position"):
        counts.layer(0).group("position")
    with pytest.raises(ConfigError, match="was not counted"):
        counts.layer(4)


def test_no_rows_give_empty_counts():
    layer = count(log_of(columns([]), {0: torch.empty(0, 2)}, 4)).layer(0)
    assert layer.load_N.tolist() == [0] * 4
    assert layer.groups == {}
