"""Votes: ties, abstentions, weights, and when they are decided."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.infer.consistency import decided, vote
from moesaic.infer.consistency.vote import fewest_to_decide

ANSWERS = st.lists(st.sampled_from(["a", "b", "c", None]), max_size=6)


def test_the_worked_votes() -> None:
    assert vote(["44", "43", "44"]).answer == "44"
    tied = vote(["7", "5", "5", "7", None])
    assert (tied.answer, tied.shares, tied.abstentions, tied.voters) == ("7", {"7": 0.5, "5": 0.5}, 1, 4)
    assert vote([None, "5", "7"]).answer == "5"
    nobody = vote([None, None])
    assert (nobody.answer, nobody.shares, nobody.abstentions) == (None, {}, 2)
    assert vote([]).answer is None


def test_weights_outvote_numbers() -> None:
    found = vote(["a", "a", "b", None], [0.25, 0.25, 1.0, 9.0])
    assert found.answer == "b"
    assert found.shares == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert vote(["a", "b"], [0.0, 0.0]).answer is None


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_bad_weights_are_named(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="weights"):
        vote(["a", "b"], weights)


@given(ANSWERS, st.integers(0, 4))
def test_decided_means_that_no_continuation_changes_the_winner(answers: list[str | None], remaining: int) -> None:
    winners = {
        vote([*answers, *more]).answer for more in itertools.product(["a", "b", "c", "new", None], repeat=remaining)
    }
    assert decided(answers, remaining) == (len(winners) == 1)


@given(ANSWERS, st.integers(0, 5))
def test_fewest_to_decide_is_the_least(answers: list[str | None], remaining: int) -> None:
    fewest = fewest_to_decide(answers, remaining)
    for count in range(fewest):
        for more in itertools.product(["a", "b", None], repeat=count):
            assert not decided([*answers, *more], remaining - count)


def test_a_leader_that_spoke_first_needs_only_half() -> None:
    assert fewest_to_decide([], 20) == 10
    assert decided(["a"] * 10, 10)
    assert not decided(["b"] + ["a"] * 6, 5, largest_weight=1.0)
    assert decided(["b"] + ["a"] * 7, 5)
    assert not decided(["a"] * 2, 1, [0.5, 0.25])
