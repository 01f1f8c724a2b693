import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.builders import numbered_documents, store_of

from moesaic.data import OrderedBatches, PackedSequences, TokenBatches
from moesaic.errors import ConfigError, DataError

STORE = store_of(numbered_documents([3, 40, 7, 31, 9]))
SEQUENCES = PackedSequences(STORE, 4, isolate_documents=True)  # 22 sequences, 5 batches of 4 an epoch


def batches(**options: int) -> TokenBatches:
    return TokenBatches(SEQUENCES, **{"batch_size": 4, "seed": 3, **options})


def take(loader: TokenBatches, count: int) -> list[list[list[int]]]:
    return [next(loader)["input_ids"].tolist() for _ in range(count)]


def test_equal_seeds_give_equal_orders_and_others_differ():
    assert take(batches(), 12) == take(batches(), 12)
    assert take(batches(), 12) != take(batches(seed=4), 12)


def test_an_epoch_takes_each_sequence_once_and_the_next_has_another_order():
    loader = batches()
    first, second = take(loader, 5), take(loader, 5)
    assert (loader.epoch, loader.batch_index) == (1, 5)
    for epoch in (first, second):
        rows = [tuple(row) for batch in epoch for row in batch]
        assert len(set(rows)) == len(rows) == 20
    assert first != second


@settings(max_examples=30)
@given(st.integers(0, 17), st.sampled_from([1, 2, 4]))
def test_resumes_exactly_at_any_step_with_any_number_of_shards(step: int, num_shards: int):
    loader = batches()
    take(loader, step)
    state = loader.state_dict()
    expected = take(loader, 8)
    shards = [batches(num_shards=num_shards, shard_index=index) for index in range(num_shards)]
    for shard in shards:
        shard.load_state_dict(state)
        assert shard.state_dict() == state
    parts = [take(shard, 8) for shard in shards]
    joined = [[row for rows in step_rows for row in rows] for step_rows in zip(*parts, strict=True)]
    assert joined == expected


@pytest.mark.parametrize("options", [{"seed": 4}, {"batch_size": 5}])
def test_a_state_of_another_order_is_refused(options: dict[str, int]):
    with pytest.raises(DataError, match=rf"cannot resume: the saved position has {next(iter(options))} = "):
        batches(**options).load_state_dict(batches().state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 23}, r"data\.batch_size = 23 is more than the 22 training sequences"),
        ({"num_shards": 3}, r"data\.batch_size = 4 cannot be shared by 3 processes; choose a multiple of 3"),
        ({"num_shards": 2, "shard_index": 2}, "shard_index = 2 is not a shard"),
    ],
)
def test_impossible_batches_are_refused(options: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        batches(**options)


def test_ordered_batches_are_fixed_and_hold_every_token():
    fixed = OrderedBatches(PackedSequences(STORE, 4, keep_partial=True), 5)
    assert [len(batch["input_ids"]) for batch in fixed] == [5, 5, 5, 5, 3]
    tokens = torch.cat([batch["input_ids"][batch["document_ids"] >= 0] for batch in fixed])
    assert tokens.tolist() == list(range(90))
    assert torch.equal(fixed[-1]["input_ids"], fixed[4]["input_ids"])
    with pytest.raises(IndexError):
        fixed[5]
