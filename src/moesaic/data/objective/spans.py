"""Span corruption of one text: how long it may be, which tokens are noise, and what is read and predicted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Lengths(NamedTuple):
    """Sizes of one corrupted text.

    Attributes:
        tokens: L.
        noise: tokens to be predicted.
        spans: of noise.
    """

    tokens: int
    noise: int
    spans: int

    @property
    def inputs(self) -> int:
        """Tokens read: what is left, a sentinel a span, the end of text."""
        return self.tokens - self.noise + self.spans + 1

    @property
    def targets(self) -> int:
        """Tokens predicted: the spans, each after its sentinel, and the end of text."""
        return self.noise + self.spans + 1


class Corrupted(NamedTuple):
    """A text as what is read and what is predicted.

    Attributes:
        inputs: ids.
        targets: ids.
        input_source: place in the text that each input stands for; a sentinel stands for the first token of its span.
        target_source: likewise.
    """

    inputs: np.ndarray
    targets: np.ndarray
    input_source: np.ndarray
    target_source: np.ndarray


def lengths_of(tokens: int, noise_density: float, mean_span: float) -> Lengths:
    """Noise and spans of L tokens: round(L r), and round(noise / mu), halves to even; at least one token is left and one
    is noise, and every span follows a token that is left."""
    noise = min(max(round(tokens * noise_density), 1), tokens - 1)
    spans = min(max(round(noise / mean_span), 1), noise, tokens - noise)
    return Lengths(tokens, noise, spans)


def longest(inputs_length: int, noise_density: float, mean_span: float) -> Lengths:
    """The longest text of which no more than `inputs_length` tokens are read; with half of it noise, no more is predicted.

    As T5 counts it: L grows from `inputs_length` until one more would not fit, and for r = 0.5 is one less where targets
    came out longer than inputs.
    """
    found = lengths_of(max(2, inputs_length), noise_density, mean_span)
    while found.inputs > inputs_length and found.tokens > 2:
        found = lengths_of(found.tokens - 1, noise_density, mean_span)
    while (more := lengths_of(found.tokens + 1, noise_density, mean_span)).inputs <= inputs_length:
        found = more
    if noise_density == 0.5 and found.targets > found.inputs and found.tokens > 2:
        found = lengths_of(found.tokens - 1, noise_density, mean_span)
    return found


def fitting(sequence_length: int, noise_density: float, mean_span: float) -> Lengths:
    """The longest text whose inputs take half of a sequence, and whose inputs and targets together fit it."""
    found = longest(sequence_length // 2, noise_density, mean_span)
    while found.inputs + found.targets > sequence_length and found.tokens > 2:
        found = lengths_of(found.tokens - 1, noise_density, mean_span)
    return found


def noise_mask(lengths: Lengths, rng: np.random.Generator) -> np.ndarray:
    """Which of L tokens are noise: spans of random lengths between stretches of random lengths, which come first."""
    kept = _segments(lengths.tokens - lengths.noise, lengths.spans, rng)
    spans = _segments(lengths.noise, lengths.spans, rng)
    return np.repeat(np.tile([False, True], lengths.spans), np.stack([kept, spans], axis=1).ravel())


def corrupt(tokens: np.ndarray, noise: np.ndarray, sentinels: np.ndarray, end: int) -> Corrupted:
    """Cut the noise out of a text.

    Args:
        tokens: ids (L,).
        noise: which of them are to be predicted, bool (L,).
        sentinels: ids, at least as many as there are spans.
        end: id of the end of text, last of inputs and of targets.
    """
    starts = noise & ~np.concatenate([[False], noise[:-1]])
    (start,) = np.nonzero(starts)
    sentinel = sentinels[: len(start)]
    place = np.arange(len(tokens))
    read = ~noise | starts
    inputs = tokens.copy()
    inputs[start] = sentinel
    # Where in the predicted tokens each span begins.
    before = np.cumsum(noise)[start] - 1
    return Corrupted(
        inputs=np.append(inputs[read], end),
        targets=np.append(np.insert(tokens[noise], before, sentinel), end),
        input_source=np.append(place[read], len(tokens) - 1),
        target_source=np.append(np.insert(place[noise], before, start), len(tokens) - 1),
    )


def _segments(items: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of `count` segments of at least 1 that add up to `items`, all ways of cutting equally likely."""
    cuts = np.sort(rng.choice(items - 1, count - 1, replace=False)) + 1 if count > 1 else np.empty(0, np.int64)
    return np.diff(np.concatenate([[0], cuts, [items]])).astype(np.int64)
