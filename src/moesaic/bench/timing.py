"""Timing in turns: in every round each contender runs once, and each round starts with another one.

So a busy moment of the machine, or a clock that changes, falls on all of them.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping

from moesaic.bench.contenders import Entry

# A sample of a fast contender is the mean of so many calls that it lasts this long.
LEAST_SECONDS = 0.02
MOST_REPEATS = 100
FEWEST_ROUNDS = 2
LONG_SECONDS = 1.0


class TimeUp(Exception):
    """The time limit of the whole run has passed."""


def time_in_turns(
    entries: Mapping[str, Entry],
    samples: dict[str, list[float]],
    *,
    rounds: int,
    patience: float,
    deadline: float = math.inf,
    tell: Callable[[str], None] = lambda text: None,
    faults: dict[str, str] | None = None,
    warm: Mapping[str, float] | None = None,
) -> None:
    """Fill `samples` with seconds a call, one number a round.

    Args:
        entries: who takes part; each has run once already.
        samples: lists to add to. They hold what was measured when this ends with an exception.
        rounds: how many.
        patience: seconds for one contender; one that is slower takes part in fewer rounds, in two at least.
        deadline: time of `time.monotonic` after which no round starts.
        tell: gets what is going on, in a few words.
        faults: gets the reason of each contender that raises; it is then out. Without it the error is raised.
        warm: seconds that the run before this took. One that took more than a second needs no other to warm up.

    Raises:
        TimeUp: at the deadline.
    """
    plan: dict[str, tuple[int, int]] = {}  # rounds and repeats
    for name, entry in entries.items():
        _check(deadline)
        seconds = (warm or {}).get(name, 0.0)
        if seconds < LONG_SECONDS:
            tell(f"warming up {name}")
            started = time.perf_counter()
            if _attempt(entry, 1, name, faults) is None:
                continue
            seconds = time.perf_counter() - started
        repeats = max(1, min(MOST_REPEATS, math.ceil(LEAST_SECONDS / max(seconds, 1e-9))))
        plan[name] = max(FEWEST_ROUNDS, min(rounds, int(patience / (seconds * repeats)))), repeats
    names = list(plan)
    gc.collect()
    gc.disable()
    try:
        for round_ in range(max((count for count, _ in plan.values()), default=0)):
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                count, repeats = plan[name]
                if round_ >= count or name not in entries or (faults and name in faults):
                    continue
                _check(deadline)
                tell(f"round {round_ + 1}/{count}, {name}")
                seconds = _attempt(entries[name], repeats, name, faults)
                if seconds is not None:
                    samples.setdefault(name, []).append(seconds)
    finally:
        gc.enable()


def _attempt(entry: Entry, repeats: int, name: str, faults: dict[str, str] | None) -> float | None:
    """The mean of `repeats` samples, or None with the reason in `faults`."""
    try:
        return sum(entry.sample() for _ in range(repeats)) / repeats
    except Exception as error:
        if faults is None:
            raise
        faults[name] = describe(error)
        return None


def describe(error: Exception) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _check(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeUp
