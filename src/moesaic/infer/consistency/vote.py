"""A vote over the answers of several samples (Wang et al., Self-Consistency, ICLR 2023, section 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moesaic.errors import ConfigError


@dataclass(frozen=True)
class Vote:
    """How a vote went.

    Attributes:
        answer: the winner; None if everybody abstained, or no vote weighs anything.
        shares: of every answer, its part of the weight of those who voted; the first given first.
        abstentions: samples without an answer.
        voters: samples with one.
    """

    answer: str | None
    shares: dict[str, float]
    abstentions: int
    voters: int


def vote(answers: Sequence[str | None], weights: Sequence[float] | None = None) -> Vote:
    """The answer of most weight; of several with equal weight the one that the earliest sample gave.

    Args:
        answers: normalised answers in the order of the samples; None is an abstention.
        weights: of each sample, at least 0; None counts each as 1.

    Raises:
        ConfigError: if there are not as many weights as answers, or one is negative or not finite.
    """
    totals = _totals(answers, weights)
    everything = math.fsum(totals.values())
    shares = {answer: total / everything if everything else 0.0 for answer, total in totals.items()}
    # max keeps the first of equals, and a dict the order of first answers.
    winner = max(totals, key=totals.__getitem__) if everything else None
    abstentions = sum(answer is None for answer in answers)
    return Vote(winner, shares, abstentions, len(answers) - abstentions)


def decided(
    answers: Sequence[str | None],
    remaining: int,
    weights: Sequence[float] | None = None,
    *,
    largest_weight: float = 1.0,
) -> bool:
    """Whether `remaining` further samples of at most `largest_weight` can no longer change the winner of `vote`."""
    totals = _totals(answers, weights)
    if remaining == 0:
        return True
    if not any(totals.values()):
        return False
    order = list(totals)
    leader = max(totals, key=totals.__getitem__)
    reach = remaining * largest_weight
    for answer in order:
        # Who spoke before the leader wins a tie with it; who speaks later, or has not yet spoken, does not.
        if answer != leader:
            ahead = totals[leader] - totals[answer]
            if ahead < reach or (ahead == reach and order.index(answer) < order.index(leader)):
                return False
    return totals[leader] >= reach


def fewest_to_decide(answers: Sequence[str | None], remaining: int) -> int:
    """How many more unweighted samples it takes at least until `decided`: those if all of them vote for the leader."""
    leader = vote(answers).answer or ""
    for more in range(remaining + 1):
        if decided([*answers, *[leader] * more], remaining - more):
            return more
    return remaining


def _totals(answers: Sequence[str | None], weights: Sequence[float] | None) -> dict[str, float]:
    if weights is None:
        weights = [1.0] * len(answers)
    if len(weights) != len(answers):
        raise ConfigError(
            "weights", len(weights), f"are not as many as the {len(answers)} answers", "give one for each"
        )
    by_answer: dict[str, list[float]] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if not (weight >= 0 and math.isfinite(weight)):
            raise ConfigError("weights", weight, "can't weigh a vote", "give finite weights of at least 0")
        if answer is not None:
            by_answer.setdefault(answer, []).append(weight)
    return {answer: math.fsum(found) for answer, found in by_answer.items()}
