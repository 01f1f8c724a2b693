"""How sure an accuracy is, and whether two runs differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from moesaic.errors import DataError


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers.

    Attributes:
        value: between 0 and 1; nan without items.
        low: lower end of its 95 % interval.
        high: upper end.
        correct: right answers.
        items: all.
    """

    value: float
    low: float
    high: float
    correct: int
    items: int


def accuracy(correct: int, items: int, *, level: float = 0.95) -> Accuracy:
    """Accuracy with Wilson's score interval (Wilson 1927), which holds for few items and for shares near 0 and 1."""
    if not items:
        return Accuracy(math.nan, math.nan, math.nan, 0, 0)
    z, share = NormalDist().inv_cdf((1 + level) / 2), correct / items
    centre = share + z * z / (2 * items)
    spread = z * math.sqrt(share * (1 - share) / items + z * z / (4 * items * items))
    scale = 1 + z * z / items
    # At 0 and 1 the ends are exact; rounding would miss them.
    low = 0.0 if correct == 0 else (centre - spread) / scale
    high = 1.0 if correct == items else (centre + spread) / scale
    return Accuracy(share, low, high, correct, items)


@dataclass(frozen=True)
class Paired:
    """Two runs on the same items.

    Attributes:
        items: that both answered.
        gained: right now, wrong in the baseline.
        lost: wrong now, right in the baseline.
        difference: of the accuracies, this run's minus the baseline's.
        low: lower end of its 95 % interval (Wald's, of paired shares).
        high: upper end.
        p_value: of McNemar's exact test: how likely at least so lopsided a split of the changed items is by chance.
    """

    items: int
    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p_value: float


def compare(run: Mapping[str, bool], baseline: Mapping[str, bool]) -> Paired:
    """Compare two runs item by item (McNemar 1947, with the exact binomial distribution).

    Args:
        run: whether each item was answered right, by id.
        baseline: the same of the run to compare with.

    Raises:
        DataError: if they have not the same items.
    """
    if run.keys() != baseline.keys() or not run:
        odd = sorted(run.keys() ^ baseline.keys())
        named = f": {odd[0]!r} is only in one" if odd else ""
        raise DataError(f"the runs to compare have not the same items{named}; evaluate both on the same task")
    gained = sum(right and not baseline[name] for name, right in run.items())
    lost = sum(baseline[name] and not right for name, right in run.items())
    items, changed = len(run), gained + lost
    difference = (gained - lost) / items
    spread = NormalDist().inv_cdf(0.975) * math.sqrt(max(changed - (gained - lost) ** 2 / items, 0.0)) / items
    return Paired(items, gained, lost, difference, difference - spread, difference + spread, mcnemar(gained, lost))


def mcnemar(gained: int, lost: int) -> float:
    """P-value of McNemar's exact test, two-sided: 1 where nothing changed."""
    tail = sum(math.comb(gained + lost, count) for count in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (gained + lost))
