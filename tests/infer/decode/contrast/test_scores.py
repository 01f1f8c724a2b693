"""The contrast of two distributions, its mask, and where it stands among other processors of scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
)

from moesaic.errors import ConfigError
from moesaic.infer.consistency import RowSampler, row_seed
from moesaic.infer.decode.contrast import ContrastProcessor, Strength, contrast, plausible, with_contrast

STRONG, WEAK = torch.tensor([[2.0, 1.5, 0.0, -1.0]]), torch.tensor([[2.0, 0.4, -1.0, -1.0]])
TRAP = torch.tensor([[0.0, 1.0, 6.0, 2.0]])
IDS = torch.zeros(1, 1, dtype=torch.int64)

logits = st.lists(st.floats(-30, 30, width=32), min_size=6, max_size=6).map(lambda row: torch.tensor([row]))


class Passed:
    """Weak logits without a model."""

    def __init__(self, weak_WV: Tensor) -> None:
        self.weak_WV = weak_WV

    def __call__(self, inputs: dict[str, Any], /) -> Any: ...

    def reorder(self, cache: Any, rows_B: Tensor, /) -> Any: ...


def processor(
    weak_WV: Tensor, *rows: Strength | None, log_probabilities: bool = False, ended: Tensor | None = None
) -> ContrastProcessor:
    return ContrastProcessor(Passed(weak_WV), rows, [2], log_probabilities=log_probabilities, ended=lambda: ended)


def test_the_worked_example() -> None:
    assert plausible(STRONG, 0.1).tolist() == [[True, True, True, False]]  # the cutoff is 2 - 2.3026
    found = contrast(STRONG, WEAK, alpha=0.1, beta=0.5)
    torch.testing.assert_close(found, torch.tensor([[2.0, 2.05, 0.5, -torch.inf]]))
    torch.testing.assert_close(found.softmax(-1), torch.tensor([[0.4397, 0.4622, 0.0981, 0.0]]), rtol=0, atol=5e-5)
    assert (found.argmax(), STRONG.argmax()) == (1, 0)


def test_the_end_of_sequence_trap() -> None:
    weak = torch.zeros_like(TRAP)
    before = processor(weak, Strength(0.1, 0.5, eos_ban="before_mask"))(IDS, TRAP.clone())
    assert before.argmax() == 3
    assert before[0, 2] == -torch.inf
    official = processor(weak, Strength(0.1, 0.5, eos_ban="official"))
    with pytest.raises(ConfigError, match=r"eos_ban = 'official' leaves no token.*before_mask"):
        official(IDS, TRAP.clone())
    # Where another token is plausible it gives the published scores, which differ from those of the other order.
    strong = torch.tensor([[0.0, 3.0, 4.0, 0.9]])
    found = official(IDS, strong.clone())
    assert found.isfinite().tolist() == [[False, True, False, False]]
    assert processor(weak, Strength(0.1, 0.5, eos_ban="before_mask"))(IDS, strong.clone()).isfinite().sum() == 2
    # What has ended is overwritten, whatever its scores, and must only be drawn from.
    ended = processor(weak, Strength(0.1, 0.5, eos_ban="official"), ended=torch.tensor([True]))(IDS, TRAP.clone())
    assert ended.softmax(-1).isfinite().all()
    assert processor(weak, Strength(0.1, 0.5))(IDS, TRAP.clone()).argmax() == 2


@given(logits, logits, st.floats(0.01, 1), st.floats(0, 10), st.floats(-20, 20), st.floats(-20, 20))
def test_against_float64_and_shifted(
    strong: Tensor, weak: Tensor, alpha: float, beta: float, shift: float, other: float
) -> None:
    found = contrast(strong, weak, alpha=alpha, beta=beta)
    s, w = strong.double(), weak.double()
    cutoff = s.max() + math.log(alpha)
    expected = (1 + beta) * s - beta * w
    kept = found > -torch.inf
    assert kept.any()
    torch.testing.assert_close(found[kept].double(), expected[kept], rtol=1e-5, atol=1e-4 * (1 + beta))
    clear = (s - cutoff).abs() > 1e-4
    assert torch.equal(kept[clear], (s >= cutoff)[clear])
    # Logits are known up to a constant for each row, so log-probabilities give the same distribution.
    moved = contrast(strong + shift, weak + other, alpha=alpha, beta=beta)
    normal = contrast(strong.log_softmax(-1), weak.log_softmax(-1), alpha=alpha, beta=beta)
    if clear.all():
        torch.testing.assert_close(moved.softmax(-1), found.softmax(-1), rtol=1e-3, atol=1e-4 * (1 + beta))
        torch.testing.assert_close(normal.softmax(-1), found.softmax(-1), rtol=1e-3, atol=1e-4 * (1 + beta))


@given(logits, logits, st.floats(0, 10))
def test_extremes(strong: Tensor, weak: Tensor, beta: float) -> None:
    only = contrast(strong, weak, alpha=1, beta=beta)
    assert torch.equal(only > -torch.inf, strong == strong.max())
    assert torch.equal(contrast(strong, weak, alpha=1e-40, beta=0), strong)
    assert torch.equal(
        contrast(strong, strong, alpha=0.1, beta=beta)[plausible(strong, 0.1)], strong[plausible(strong, 0.1)]
    )
    banned = strong.masked_fill(torch.arange(6) % 2 == 0, -torch.inf)
    found = contrast(banned, weak, alpha=1e-30, beta=beta)
    assert not found.isnan().any()
    assert (found[:, ::2] == -torch.inf).all()
    nothing = contrast(torch.full_like(strong, -torch.inf), weak, alpha=0.1, beta=beta)
    assert (nothing == -torch.inf).all()


def test_ties_of_the_strong_pass_are_settled_by_the_weak_one() -> None:
    found = contrast(torch.tensor([[1.0, 1.0, 0.9]]), torch.tensor([[2.0, 0.0, -9.0]]), alpha=1, beta=0.5)
    assert found.tolist() == [[0.5, 1.5, -math.inf]]


def test_rows_have_their_own_strength_or_none() -> None:
    strong_BV = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    weak_WV = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    rows = [Strength(0.2, 0.5), None, Strength(0.01, 2.0, strong_temperature=2.0), None, Strength(0.2, 0.5)]
    found = processor(weak_WV, *rows)(IDS.expand(5, -1), strong_BV.clone())
    assert torch.equal(found[1], strong_BV[1])
    assert torch.equal(found[3], strong_BV[3])
    assert torch.equal(found[0], contrast(strong_BV[:1], weak_WV[:1], alpha=0.2, beta=0.5)[0])
    assert torch.equal(found[2], contrast(strong_BV[2:3] / 2, weak_WV[1:2], alpha=0.01, beta=2.0)[0])
    assert torch.equal(found[4], contrast(strong_BV[4:], weak_WV[2:], alpha=0.2, beta=0.5)[0])
    summed = processor(weak_WV, *rows, log_probabilities=True)(IDS.expand(5, -1), strong_BV.clone())
    torch.testing.assert_close(summed[4], found[4].log_softmax(-1))
    untouched = strong_BV.clone()
    processor(weak_WV, *rows)(IDS.expand(5, -1), untouched)
    assert torch.equal(untouched, strong_BV)  # output_logits are these


def test_bans_and_penalties_act_before_and_temperature_after() -> None:
    contrasting = processor(WEAK, Strength(0.1, 0.5))
    before = [
        SuppressTokensLogitsProcessor([0]),
        RepetitionPenaltyLogitsProcessor(2.0),
        MinLengthLogitsProcessor(9, 3, device="cpu"),
    ]
    after = [TemperatureLogitsWarper(0.5), RowSampler([1])]
    everything = with_contrast(LogitsProcessorList([*before, *after]), contrasting)
    assert list(everything) == [*before, contrasting, *after]
    # With token 0 out, the likeliest is the 1.5 of token 1, and the cutoff -0.8: token 2 stays, token 3 does not.
    found = contrasting(IDS, SuppressTokensLogitsProcessor([0])(IDS, STRONG.clone()))
    torch.testing.assert_close(found, torch.tensor([[-torch.inf, 2.05, 0.5, -torch.inf]]))
    penalised = RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([[1]]), STRONG.clone())
    torch.testing.assert_close(contrasting(IDS, penalised), torch.tensor([[2.0, 0.925, 0.5, -torch.inf]]))


def test_draws_follow_the_contrast() -> None:
    draws = 10_000
    expected_V = contrast(STRONG, WEAK, alpha=0.1, beta=0.5).softmax(-1)[0]
    sampler = RowSampler([row_seed(0, "x", number) for number in range(draws)])
    listed = with_contrast(
        LogitsProcessorList([sampler]), processor(WEAK.expand(draws, -1), *[Strength(0.1, 0.5)] * draws)
    )
    counts_V = torch.bincount(listed(IDS.expand(draws, -1), STRONG.expand(draws, -1)).argmax(-1), minlength=4)
    assert counts_V[3] == 0
    chi_square = ((counts_V - expected_V * draws)[:3] ** 2 / (expected_V * draws)[:3]).sum()
    assert chi_square < 13.8  # p = 0.001 at 2 degrees of freedom
