"""Best of n: several samples of a prompt, and the one that a scorer likes most."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moesaic.errors import ConfigError
from moesaic.infer.consistency.sample import Sample, Sampler
from moesaic.infer.consistency.self_consistency import check_samples

# A score for each sample; higher is better. `mean_log_probability(model)` makes one.
Scorer = Callable[[Sequence[Sample]], Sequence[float]]


@dataclass(frozen=True)
class Best:
    """The choice for one prompt.

    Attributes:
        sample: the one with the highest score, of equals the earliest.
        samples: all.
        scores: of each.
    """

    sample: Sample
    samples: tuple[Sample, ...]
    scores: tuple[float, ...]


def best_of(sampler: Sampler, prompts: Sequence[str], score: Scorer, *, samples: int = 20) -> list[Best]:
    """Sample every prompt `samples` times and take the best.

    Args:
        sampler: draws samples; what they cost is in its `usage`.
        prompts: texts to continue.
        score: gives each of the samples handed to it a number; it gets those of one prompt at a time.
        samples: of each prompt, at least 1.

    Raises:
        ConfigError: if `samples` is below 1, above 1 with a decoding whose samples are all equal, or if `score` does
            not give one number for each sample.
    """
    check_samples(sampler, samples)
    drawn = sampler.draw([(prompt, number) for prompt in prompts for number in range(samples)])
    chosen = []
    for first in range(0, len(drawn), samples):
        group = drawn[first : first + samples]
        scores = [float(value) for value in score(group)]
        if len(scores) != samples or any(math.isnan(value) for value in scores):
            raise ConfigError("score", scores, f"is not a number for each of {samples} samples", "correct the scorer")
        # max keeps the first of equals.
        best = max(range(samples), key=scores.__getitem__)
        chosen.append(Best(group[best], tuple(group), tuple(scores)))
    return chosen
