"""Self-consistency: several samples of a prompt, and a vote over their answers (Wang et al., ICLR 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moesaic.errors import ConfigError
from moesaic.infer.consistency.decoding import Generate
from moesaic.infer.consistency.extract import Extractor
from moesaic.infer.consistency.sample import Sample, Sampler
from moesaic.infer.consistency.vote import Vote, decided, fewest_to_decide, vote

# Weights of samples; what is not in a vote is not weighed.
Weigh = Callable[[Sequence[Sample]], Sequence[float]]


@dataclass(frozen=True)
class Consensus:
    """The vote on one prompt.

    Attributes:
        vote: how it went; with early stopping, among the samples drawn.
        samples: those drawn.
        answers: of each sample; None is an abstention.
        weights: of each sample.
        wanted: samples that were asked for.
    """

    vote: Vote
    samples: tuple[Sample, ...]
    answers: tuple[str | None, ...]
    weights: tuple[float, ...]
    wanted: int

    @property
    def answer(self) -> str | None:
        """The winner; None if no sample had an answer."""
        return self.vote.answer


def self_consistency(
    sampler: Sampler,
    prompts: Sequence[str],
    extract: Extractor | Sequence[Extractor],
    *,
    samples: int = 20,
    early_stop: bool = True,
    weigh: Weigh | None = None,
    largest_weight: float | None = None,
) -> list[Consensus]:
    """Sample every prompt `samples` times and let the answers vote.

    Of answers with equal votes the one of the earliest sample wins; a sample without an answer abstains. Samples have
    seeds of their own, so more of them only add to those before.

    Args:
        sampler: draws samples; what they cost is in its `usage`.
        prompts: texts to continue.
        extract: finds the answer in a text; one for all prompts, or one for each.
        samples: of each prompt, at least 1.
        early_stop: leave out samples that can't change the winner. It is the same one; shares are of fewer samples.
        weigh: weights of samples, for instance `likelihood_weights`; None counts each as 1.
        largest_weight: that `weigh` can give; without it there is no early stop of a weighted vote.

    Raises:
        ConfigError: if `samples` is below 1, or above 1 with a decoding whose samples are all equal.
    """
    check_samples(sampler, samples)
    extractors = [extract] * len(prompts) if callable(extract) else list(extract)
    if len(extractors) != len(prompts):
        raise ConfigError("extract", len(extractors), f"are not one for each of {len(prompts)} prompts", "give as many")
    polls = [_Poll(prompt, found, samples) for prompt, found in zip(prompts, extractors, strict=True)]
    stops = early_stop and (weigh is None or largest_weight is not None)
    while pending := [poll for poll in polls if not poll.closed]:
        asked: list[tuple[_Poll, int]] = []
        for poll in pending:
            left = samples - len(poll.drawn)
            more = fewest_to_decide(poll.answers, left) if stops and weigh is None else left
            if stops and weigh is not None:
                more = min(left, max(1, sampler.batch_size))
            asked += [(poll, len(poll.drawn) + number) for number in range(max(more, 1))]
            if len(asked) >= sampler.batch_size and stops:
                break  # later prompts wait: what is drawn now may already close this one
        for (poll, _), sample in zip(
            asked, sampler.draw([(poll.prompt, number) for poll, number in asked]), strict=True
        ):
            poll.take(sample)
        for poll in {id(poll): poll for poll, _ in asked}.values():
            poll.weigh(weigh)
            left = samples - len(poll.drawn)
            poll.closed = not left or (
                stops and decided(poll.answers, left, poll.weights, largest_weight=largest_weight or 1.0)
            )
    return [poll.result() for poll in polls]


def check_samples(sampler: Sampler, samples: int) -> None:
    """Check that so many samples of a prompt make sense.

    Raises:
        ConfigError: if they don't.
    """
    if samples < 1:
        raise ConfigError("samples", samples, "is below 1", "choose 1 or more")
    if samples > 1 and isinstance(sampler.decoding, Generate) and sampler.decoding.repeats:
        raise ConfigError(
            "samples", samples, "of a decoding that does not sample are all equal", "set do_sample=True, or draw one"
        )


class _Poll:
    """What is known of one prompt's vote."""

    def __init__(self, prompt: str, extract: Extractor, wanted: int) -> None:
        self.prompt, self._extract, self._wanted, self.closed = prompt, extract, wanted, False
        self.drawn: list[Sample] = []
        self.answers: list[str | None] = []
        self.weights: list[float] = []

    def take(self, sample: Sample) -> None:
        self.drawn.append(sample)
        self.answers.append(self._extract(sample.text))

    def weigh(self, weigh: Weigh | None) -> None:
        new = self.drawn[len(self.weights) :]
        self.weights += [1.0] * len(new) if weigh is None else list(weigh(new))

    def result(self) -> Consensus:
        found = vote(self.answers, self.weights)
        return Consensus(found, tuple(self.drawn), tuple(self.answers), tuple(self.weights), self._wanted)
