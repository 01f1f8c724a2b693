"""Everyone runs once a round in a rotating order, slow ones less often, and what breaks is said."""

from __future__ import annotations

import time

import pytest

from moesaic.bench.contenders import Entry
from moesaic.bench.timing import TimeUp, time_in_turns


class Logged(Entry):
    def __init__(self, name: str, log: list[str], seconds: float = 0.021, break_at: int | None = None) -> None:
        self.name, self.log, self.seconds, self.break_at = name, log, seconds, break_at

    def outcome(self) -> None:
        return None

    def sample(self) -> float:
        if self.log.count(self.name) == self.break_at:
            raise ValueError("no more")
        self.log.append(self.name)
        time.sleep(self.seconds)
        return self.seconds


def test_rounds_rotate() -> None:
    log: list[str] = []
    samples: dict[str, list[float]] = {}
    time_in_turns({name: Logged(name, log) for name in "abc"}, samples, rounds=3, patience=9)
    assert "".join(log) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(found) for name, found in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_fast_ones_repeat_until_a_sample_lasts() -> None:
    log: list[str] = []
    time_in_turns({"a": Logged("a", log, seconds=0.006)}, {}, rounds=2, patience=9)
    assert 1 + 2 * 2 <= len(log) <= 1 + 2 * 4


def test_slow_ones_take_part_in_two_rounds() -> None:
    log: list[str] = []
    entries = {"slow": Logged("slow", log, seconds=0.1), "fast": Logged("fast", log)}
    samples: dict[str, list[float]] = {}
    time_in_turns(entries, samples, rounds=4, patience=0.15)
    assert {name: len(found) for name, found in samples.items()} == {"slow": 2, "fast": 4}


def test_one_that_was_long_warm_does_not_warm_up_again() -> None:
    log: list[str] = []
    time_in_turns({"a": Logged("a", log)}, {}, rounds=3, patience=1, warm={"a": 5.0})
    assert len(log) == 2


def test_one_that_breaks_is_out_and_the_others_go_on() -> None:
    log: list[str] = []
    samples: dict[str, list[float]] = {}
    faults: dict[str, str] = {}
    entries = {"a": Logged("a", log, break_at=2), "b": Logged("b", log)}
    time_in_turns(entries, samples, rounds=4, patience=9, faults=faults)
    assert faults == {"a": "ValueError: no more"}
    assert len(samples["b"]) == 4


def test_a_deadline_leaves_what_is_measured() -> None:
    samples: dict[str, list[float]] = {}
    with pytest.raises(TimeUp):
        time_in_turns({"a": Logged("a", [])}, samples, rounds=1000, patience=999, deadline=time.monotonic() + 2)
    assert 1 <= len(samples["a"]) < 1000
