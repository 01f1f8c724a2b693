"""Span corruption: the lengths that T5 counts with, and that nothing is lost or said twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data.objective.spans import Lengths, corrupt, fitting, lengths_of, longest, noise_mask

END, FIRST_SENTINEL = 5, 100_000


@pytest.mark.parametrize(
    ("noise_density", "mean_span", "tokens", "inputs", "targets"),
    [
        (0.15, 3, 1137, 1024, 229),
        (0.15, 8, 1178, 1024, 200),
        (0.5, 3, 1534, 1024, 1024),
        (0.5, 8, 1818, 1024, 1024),
        (0.5, 64, 2014, 1024, 1024),
    ],
)
def test_lengths_of_openmoe(noise_density: float, mean_span: float, tokens: int, inputs: int, targets: int) -> None:
    """For 1024 tokens read, of the denoisers of arXiv 2402.01739, table 2."""
    found = longest(1024, noise_density, mean_span)
    assert (found.tokens, found.inputs, found.targets) == (tokens, inputs, targets)
    assert found.noise == round(tokens * noise_density)
    assert found.spans == round(found.noise / mean_span)


@given(
    sequence_length=st.integers(16, 600),
    noise_density=st.floats(0.05, 0.9),
    mean_span=st.floats(1, 80),
)
@settings(max_examples=60)
def test_inputs_and_targets_fit_the_sequence(sequence_length: int, noise_density: float, mean_span: float) -> None:
    found = fitting(sequence_length, noise_density, mean_span)
    assert found.inputs <= sequence_length // 2 or found.tokens == 2
    assert found.inputs + found.targets <= sequence_length
    assert found.tokens + 2 * found.spans + 2 == found.inputs + found.targets
    more = lengths_of(found.tokens + 1, noise_density, mean_span)
    fits_too = more.inputs <= sequence_length // 2 and more.inputs + more.targets <= sequence_length
    assert not fits_too or noise_density == 0.5


@given(
    tokens=st.integers(2, 200), noise_density=st.floats(0.02, 0.98), mean_span=st.floats(1, 50), seed=st.integers(0, 9)
)
@settings(max_examples=80)
def test_every_token_is_read_or_predicted_once(tokens: int, noise_density: float, mean_span: float, seed: int) -> None:
    lengths = lengths_of(tokens, noise_density, mean_span)
    noise = noise_mask(lengths, np.random.default_rng(seed))
    assert (len(noise), noise.sum()) == (tokens, lengths.noise)
    assert (np.diff(noise.astype(int), prepend=0) == 1).sum() == lengths.spans
    assert not noise[0]
    text = np.arange(1000, 1000 + tokens)
    sentinels = np.arange(FIRST_SENTINEL, FIRST_SENTINEL + lengths.spans)
    found = corrupt(text, noise, sentinels, END)
    assert (len(found.inputs), len(found.targets)) == (lengths.inputs, lengths.targets)
    assert (found.inputs[-1], found.targets[-1]) == (END, END)
    for ids in (found.inputs, found.targets):
        assert ids[ids >= FIRST_SENTINEL].tolist() == sentinels.tolist()
    both = np.concatenate([found.inputs, found.targets])
    assert sorted(both[(both >= 1000) & (both < FIRST_SENTINEL)].tolist()) == text.tolist()
    # Each place knows the token that it stands for.
    for ids, source in ((found.inputs, found.input_source), (found.targets, found.target_source)):
        said = (ids >= 1000) & (ids < FIRST_SENTINEL)
        assert (text[source[said]] == ids[said]).all()
    assert restored(found.inputs.tolist(), found.targets.tolist()) == text.tolist()


def restored(inputs: list[int], targets: list[int]) -> list[int]:
    """The text again: each sentinel of the inputs is replaced by what follows it in the targets."""
    spans: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token >= FIRST_SENTINEL:
            spans[last := token] = []
        else:
            spans[last].append(token)
    return [found for token in inputs[:-1] for found in spans.get(token, [token])]


def test_a_worked_example() -> None:
    text = np.array([11, 12, 13, 14, 15, 16, 17])
    noise = np.array([False, True, True, False, False, True, False])
    found = corrupt(text, noise, np.array([91, 92]), END)
    assert found.inputs.tolist() == [11, 91, 14, 15, 92, 17, END]
    assert found.targets.tolist() == [91, 12, 13, 92, 16, END]
    assert found.input_source.tolist() == [0, 1, 3, 4, 5, 6, 6]
    assert found.target_source.tolist() == [1, 1, 2, 5, 5, 6]


def test_all_ways_of_cutting_are_equally_likely() -> None:
    rng = np.random.default_rng(0)
    counts: dict[tuple, int] = {}
    for _ in range(3000):
        mask = noise_mask(Lengths(6, 3, 2), rng)
        counts[tuple(mask.tolist())] = counts.get(tuple(mask.tolist()), 0) + 1
    assert len(counts) == 4  # two ways for three kept tokens in two stretches, two for three noise tokens in two spans
    assert max(counts.values()) < 1.2 * min(counts.values())
