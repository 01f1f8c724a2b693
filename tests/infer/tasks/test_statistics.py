"""Intervals and paired tests against published and hand-computed values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import DataError
from moesaic.infer.tasks import accuracy, compare


def test_wilson_intervals() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    for correct, items, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        found = accuracy(correct, items)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert (accuracy(5, 5).high, accuracy(0, 5).low) == (1.0, 0.0)
    assert math.isnan(accuracy(0, 0).value)


@given(st.integers(1, 500), st.data())
def test_the_interval_holds_the_share(items: int, data: st.DataObject) -> None:
    found = accuracy(data.draw(st.integers(0, items)), items)
    assert 0 <= found.low <= found.value <= found.high <= 1


def runs(both: int, gained: int, lost: int, neither: int) -> tuple[dict[str, bool], dict[str, bool]]:
    pairs = [(True, True)] * both + [(True, False)] * gained + [(False, True)] * lost + [(False, False)] * neither
    return {str(n): new for n, (new, _) in enumerate(pairs)}, {str(n): old for n, (_, old) in enumerate(pairs)}


def test_mcnemar() -> None:
    found = compare(*runs(10, 8, 2, 5))
    assert (found.items, found.gained, found.lost) == (25, 8, 2)
    # Binomial(10, 1/2): twice the chance of at most 2, (1 + 10 + 45) / 1024.
    assert found.p_value == pytest.approx(112 / 1024)
    assert found.difference == pytest.approx(6 / 25)
    half = 1.959964 * math.sqrt(10 - 36 / 25) / 25
    assert (found.low, found.high) == pytest.approx((6 / 25 - half, 6 / 25 + half), abs=1e-6)
    mirrored = compare(*reversed(runs(10, 8, 2, 5)))
    assert (mirrored.difference, mirrored.p_value) == (-found.difference, found.p_value)
    assert compare(*runs(3, 4, 4, 0)).p_value == 1.0
    assert compare(*runs(3, 0, 0, 2)).p_value == 1.0


def test_only_the_same_items_are_compared() -> None:
    with pytest.raises(DataError, match="'b' is only in one"):
        compare({"a": True}, {"a": True, "b": False})
    with pytest.raises(DataError, match="not the same items"):
        compare({}, {})
