from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.builders import numbered_documents, store_of

from moesaic.data import DataConfig, MixedBatches, MixtureStretch, PackedSequences
from moesaic.errors import ConfigError, DataError

# Tokens 0 to 39 are of domain a, 40 to 71 of b, 72 to 74 of c, which has no whole sequence.
STORE = store_of(numbered_documents([40, 32, 3]), [0, 1, 2])
SEQUENCES = {name: PackedSequences(STORE, 4, documents=np.array([index])) for index, name in enumerate("abc")}
MIXTURE = (
    MixtureStretch(until=3, shares={"a": 0.75, "b": 0.25}),
    MixtureStretch(until=7, shares={"b": 1}),
    MixtureStretch(shares={"a": 2, "b": 1}),
)


def batches(**options: int) -> MixedBatches:
    return MixedBatches(SEQUENCES, MIXTURE, **{"batch_size": 4, "seed": 3, **options})


def take(loader: MixedBatches, count: int) -> list[list[list[int]]]:
    return [next(loader)["input_ids"].tolist() for _ in range(count)]


def domains(found: list[list[list[int]]]) -> list[Counter[str]]:
    return [Counter("a" if row[0] < 40 else "b" for row in batch) for batch in found]


def test_each_stretch_has_its_shares():
    found = domains(take(batches(), 13))
    assert found[:3] == [Counter(a=3, b=1)] * 3
    assert found[3:7] == [Counter(b=4)] * 4
    assert sum(found[7:], Counter()) == Counter(a=16, b=8)
    assert all(counts["a"] in (2, 3) for counts in found[7:])


def test_a_domain_is_seen_whole_before_it_begins_anew():
    rows = [row for batch in take(batches(), 7) for row in batch if row[0] >= 40]  # 3 + 16 sequences of the 8 of b
    for start in (0, 8):
        assert sorted(row[0] for row in rows[start : start + 8]) == list(range(40, 72, 4))
    assert rows[:8] != rows[8:16]


def test_seeds_decide_the_order():
    assert take(batches(), 9) == take(batches(), 9)
    assert take(batches(), 9) != take(batches(seed=4), 9)


@settings(max_examples=30)
@given(st.integers(0, 17), st.sampled_from([1, 2, 4]))
def test_resumes_exactly_at_any_batch_with_any_number_of_shards(taken: int, num_shards: int):
    loader = batches()
    take(loader, taken)
    state = loader.state_dict()
    expected = take(loader, 6)
    shards = [batches(num_shards=num_shards, shard_index=index) for index in range(num_shards)]
    for shard in shards:
        shard.load_state_dict(state)
        assert shard.state_dict() == state
    parts = [take(shard, 6) for shard in shards]
    assert [[row for rows in step for row in rows] for step in zip(*parts, strict=True)] == expected


def test_a_state_of_another_mixture_is_refused():
    other = MixedBatches(SEQUENCES, MIXTURE[1:], 4, 3)
    with pytest.raises(DataError, match="cannot resume: the saved position has mixture = "):
        other.load_state_dict(batches().state_dict())


@pytest.mark.parametrize("domain", ["c", "d"])
def test_a_domain_without_a_sequence_is_refused(domain: str):
    mixture = (MixtureStretch(shares={"a": 1, domain: 1}),)
    with pytest.raises(
        ConfigError, match=rf"data\.mixture\.0\.shares = '{domain}' is no domain with .* have one: a, b"
    ):
        MixedBatches(SEQUENCES, mixture, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_shards": 3}, "cannot be shared by 3 processes"), ({"shard_index": 1}, "is not a shard")],
)
def test_impossible_shards_are_refused(options: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        batches(**options)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([5, 9], r"mixture\.1\.until = 9 leaves the rest open; remove it from the last stretch"),
        ([5, 5, None], r"mixture\.1\.until = 5 does not end after the stretch before it"),
        ([None, None], r"mixture\.0\.until = None does not end after"),
    ],
)
def test_stretches_that_do_not_follow_each_other_are_refused(ends: list[int | None], message: str):
    with pytest.raises(ConfigError, match=message):
        DataConfig.from_dict({"mixture": [{"until": end, "shares": {"prose": 1}} for end in ends]})
