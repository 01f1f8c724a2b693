"""Schedules over the training: ends, shapes, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moesaic.errors import ConfigError
from moesaic.layer import Schedule
from moesaic.layer.schedule import value_at


def schedule(**values: Any) -> Schedule:
    return Schedule.from_dict(values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"start": 2.0, "end": 6.0}, {0.0: 2.0, 0.25: 3.0, 0.5: 4.0, 1.0: 6.0}),
        ({"start": 2.0, "end": 6.0, "begin": 0.2, "finish": 0.6}, {0.1: 2.0, 0.2: 2.0, 0.3: 3.0, 0.6: 6.0, 0.9: 6.0}),
        ({"start": 1.0, "end": 0.0, "shape": "cosine"}, {0.0: 1.0, 1 / 3: 0.75, 0.5: 0.5, 1.0: 0.0}),
        ({"start": 1.0, "end": 0.01, "shape": "exponential"}, {0.0: 1.0, 0.5: 0.1, 1.0: 0.01}),
        # AdaMoE (arXiv 2406.13233, section 3.4): 0.02 in the first of two epochs, 0.0001 in the second.
        ({"start": 0.02, "end": 1e-4, "shape": "step", "begin": 0.5}, {0.0: 0.02, 0.499: 0.02, 0.5: 1e-4, 1.0: 1e-4}),
    ],
)
def test_values(values: dict, expected: dict[float, float]) -> None:
    assert {progress: schedule(**values).at(progress) for progress in expected} == pytest.approx(expected)


def test_progress_out_of_range_keeps_the_ends() -> None:
    assert schedule(start=1.0, end=3.0).at(-1) == 1.0
    assert schedule(start=1.0, end=3.0).at(math.nextafter(1, 2)) == 3.0


def test_a_number_is_its_own_schedule() -> None:
    assert value_at(0.3, 0.7) == 0.3
    assert value_at(schedule(start=0.0, end=1.0), 0.7) == pytest.approx(0.7)


def test_round_trip() -> None:
    one = schedule(start=1.0, end=0.1, shape="exponential", begin=0.1, finish=0.9)
    assert Schedule.from_dict(one.to_dict()) == one


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"start": 1.0}, "end = None is required"),
        ({"start": 1.0, "end": 0.0, "shape": "exponential"}, r"end = 0\.0 can't be the end of an exponential"),
        ({"start": 1.0, "end": 0.0, "begin": 0.5, "finish": 0.5}, r"begin = 0\.5 is not before finish"),
        ({"start": 1.0, "end": 0.0, "begin": 1.0}, r"begin = 1\.0 is not before finish"),
        ({"start": 1.0, "end": 0.0, "shape": "step"}, r"begin = 0\.0 leaves nothing of `start`"),
        ({"start": 1.0, "end": 0.0, "shape": "step", "begin": 0.5, "finish": 0.6}, r"finish = 0\.6 does not go with"),
        ({"start": 1.0, "end": 0.0, "finish": 1.5}, r"finish = 1\.5 is not valid; .*less than or equal to 1"),
        ({"start": 1.0, "end": 0.0, "shape": "sine"}, r"shape = 'sine' is not one of the choices"),
    ],
)
def test_bad_input_is_refused_by_name(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        schedule(**values)
