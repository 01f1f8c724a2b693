"""Sizes are read as they are written, and work and floors are what one gets by hand."""

from __future__ import annotations

import pytest

from moesaic.bench import PRESETS, Shape
from moesaic.bench.statistics import median, spread
from moesaic.bench.work import Work, layer_forward, layer_forward_backward
from moesaic.errors import ConfigError

SMALL = Shape(hidden=4, width=3, experts=8, picks=2)  # 36 weights an expert


def test_both_ways_to_write_a_shape() -> None:
    wanted = Shape(hidden=16, width=8, experts=4, picks=2)
    assert Shape.parse("d16-f8-n4-k2") == wanted
    assert Shape.parse("k=2,d=16,f=8,n=4") == wanted


@pytest.mark.parametrize("shape", PRESETS, ids=lambda shape: shape.name)
def test_the_name_of_a_shape_is_read_back(shape: Shape) -> None:
    assert Shape.parse(shape.name) == shape


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("d16-f8-n4", "lacks k"),
        ("d16-f8-n4-k5", "picks more experts than there are"),
        ("d16-f8-n4-k2-d8", "has the part 'd8'"),
        ("d16-f0-n4-k2", "has the part 'f0'"),
        ("mixtral", "has the part 'mixtral'"),
    ],
)
def test_a_shape_that_is_none(text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        Shape.parse(text)


def test_work_of_a_forward() -> None:
    # 5 tokens * 2 picks * 36 weights * 2; 6 experts * 36 * 2 bytes; 5 tokens * 4 in and out * 2 bytes.
    assert layer_forward(SMALL, 5, 6, 2) == Work(flops=720, bytes=432 + 80, weight_bytes=432)


def test_work_of_a_forward_with_its_backward() -> None:
    # Weights twice 432; gradient of 8 experts 8 * 36 * 2; 10 rows of 6 kept, written and read; tokens four times.
    wanted = Work(flops=2160, bytes=864 + 576 + 2 * 10 * 6 * 2 + 4 * 5 * 4 * 2, weight_bytes=864)
    assert layer_forward_backward(SMALL, 5, 6, 2) == wanted


def test_the_floor_is_what_binds() -> None:
    work = Work(flops=100, bytes=10, weight_bytes=10)
    assert work.floor(bandwidth=1, rate=1000) == 10
    assert work.floor(bandwidth=1000, rate=10) == 10
    assert work.floor(bandwidth=100, rate=100) == 1


def test_median_and_spread() -> None:
    assert median([5, 1, 3]) == 3
    assert median([1, 2, 4, 9]) == 3
    assert spread([1, 2, 3, 4, 5]) == 2
    assert spread([7]) == 0
