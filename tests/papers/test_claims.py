from __future__ import annotations

import math

import pytest

from moesaic.papers import Claim, judge
from moesaic.papers.claims import higher, lower

CLAIM = Claim("a beats b", "loss(b) - loss(a)", lower("a", "b"), ("a", "b"))


def seeds(*advantages: float) -> list[dict[str, dict[str, float]]]:
    return [{"a": {"loss": 3.0}, "b": {"loss": 3.0 + advantage}} for advantage in advantages]


@pytest.mark.parametrize(
    ("advantages", "verdict"),
    [
        ((0.10, 0.12, 0.11), "holds"),
        ((-0.10, -0.12, -0.11), "does not hold"),
        ((0.10, -0.05, 0.02), "not resolved"),
        ((0.10, 0.30), "not resolved"),  # the t quantile of one degree of freedom is 6.3
        ((0.10, 0.11), "holds"),
        ((0.5,), "not resolved"),
        ((0.5, 0.5), "holds"),
        ((0.0, 0.0), "not resolved"),
        ((0.1, math.nan, 0.1), "not resolved"),
        ((), "not resolved"),
    ],
)
def test_verdicts(advantages: tuple[float, ...], verdict: str):
    assert judge(CLAIM, seeds(*advantages)).verdict == verdict


def test_the_numbers_of_a_judgement():
    found = judge(CLAIM, seeds(0.1, 0.2, 0.3))
    assert found.values == pytest.approx((0.1, 0.2, 0.3))
    assert (found.mean, found.spread) == pytest.approx((0.2, 0.1))
    assert found.bound == pytest.approx(2.920 * 0.1 / math.sqrt(3))
    assert found.verdict == "holds"


def test_many_seeds_need_less_agreement_than_few():
    assert judge(CLAIM, seeds(*[0.1, -0.05, 0.02] * 20)).verdict == "holds"
    assert judge(CLAIM, seeds(*[0.1, -0.05, 0.02])).verdict == "not resolved"


def test_higher_is_lower_the_other_way_round():
    [measured] = seeds(0.25)
    assert lower("a", "b")(measured) == 0.25
    assert higher("a", "b", "loss")(measured) == -0.25
