"""Claims of a paper, and what a few seeds say of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Measured = Mapping[str, Mapping[str, float]]
"""Measurements of one seed: arm -> name -> value."""

Verdict = Literal["holds", "does not hold", "not resolved"]

# 95th percentile of Student's t by degrees of freedom; 1.645 in the limit.
_T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753)


@dataclass(frozen=True)
class Claim:
    """Something that a paper says, as a number that is above zero where it is true.

    Attributes:
        name: what is claimed, in a few words.
        success: what the number is, for a reader.
        advantage: the number for one seed, from the measurements of its arms: a difference between arms that saw the
            same data in the same order, or a distance to a bound.
        arms: arms that it needs; without one of them it is left out.
        source: where the paper says it.
    """

    name: str
    success: str
    advantage: Callable[[Measured], float]
    arms: tuple[str, ...]
    source: str = ""


def lower(better: str, worse: str, measure: str = "loss") -> Callable[[Measured], float]:
    """The advantage by which `measure` is lower in one arm than in the other."""
    return lambda measured: measured[worse][measure] - measured[better][measure]


def higher(better: str, worse: str, measure: str) -> Callable[[Measured], float]:
    """The advantage by which `measure` is higher in one arm than in the other."""
    return lower(worse, better, measure)


@dataclass(frozen=True)
class Judgement:
    """What the seeds say of a claim.

    Attributes:
        claim: which.
        verdict: "holds" where the advantage is above zero with 95 % confidence, "does not hold" where it is below zero
            with the same, else "not resolved".
        values: the advantage of each seed.
        mean: over seeds; NaN without any.
        spread: standard deviation over seeds; NaN for fewer than two.
        bound: the mean may be wrong by this much: t * spread / sqrt(seeds), one-sided 95 %; infinite for one seed.
    """

    claim: Claim
    verdict: Verdict
    values: tuple[float, ...]
    mean: float
    spread: float
    bound: float


def judge(claim: Claim, measured_by_seed: Sequence[Measured]) -> Judgement:
    """Judge `claim` over seeds, each of which gives one paired value.

    A one-sided t-test at 5 % either way. One seed never resolves anything.
    """
    values = tuple(float(claim.advantage(measured)) for measured in measured_by_seed)
    if not values or any(math.isnan(value) for value in values):
        return Judgement(claim, "not resolved", values, math.nan, math.nan, math.inf)
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Judgement(claim, "not resolved", values, mean, math.nan, math.inf)
    spread = statistics.stdev(values)
    bound = _quantile(count - 1) * spread / math.sqrt(count)
    verdict: Verdict = "not resolved"
    if mean - bound > 0:
        verdict = "holds"
    elif mean + bound < 0:
        verdict = "does not hold"
    return Judgement(claim, verdict, values, mean, spread, bound)


def _quantile(degrees: int) -> float:
    return _T95[degrees - 1] if degrees <= len(_T95) else 1.645 + 1.6 / degrees
