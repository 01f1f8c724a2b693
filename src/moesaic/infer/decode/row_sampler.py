"""Sampling in which every row of a batch has random numbers of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


def row_seed(seed: int, prompt: str, sample: int) -> int:
    """The seed of one sample: it depends on `seed`, the prompt and the sample's number, and on no other row."""
    digest = hashlib.sha256(f"{seed}\0{sample}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # generators take 63 bits


class RowSampler(LogitsProcessor):
    """Draws each row's next token with the row's own generator, and leaves only that token a score.

    A step takes one uniform number for a row, which picks the token by the inverse of the cumulative distribution. So
    what a row draws depends on its seed and its logits alone: not on the rows beside it, the device, or what else
    draws random numbers. Whoever takes the largest score, or samples from what is left, takes the token.

    Args:
        seeds: of each row.
        warpers: change the logits before: temperature, top-k and so on.
    """

    def __init__(self, seeds: Sequence[int], warpers: LogitsProcessorList | None = None) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._warpers = warpers or LogitsProcessorList()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) that are 0 at each row's token and -inf elsewhere; `input_ids` (B, S) are handed to warpers."""
        token_B1 = self.draw(self._warpers(cast(Any, input_ids), cast(Any, scores)))
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)

    def draw(self, logits_BV: Tensor) -> Tensor:
        """The next token (B, 1) of every row from softmax(logits)."""
        uniform_B1 = torch.tensor(
            [torch.rand((), generator=generator, dtype=torch.float64).item() for generator in self._generators],
            dtype=torch.float64,
        ).unsqueeze(1)
        cumulative_BV = logits_BV.double().softmax(-1).cumsum(-1)
        # The last sum may miss 1 by rounding; scaled by it, no number lies beyond the last token with a probability.
        aim_B1 = uniform_B1.to(logits_BV.device) * cumulative_BV[:, -1:]
        return torch.searchsorted(cumulative_BV, aim_B1, right=True).clamp_(max=logits_BV.shape[1] - 1)


def warpers(config: GenerationConfig) -> LogitsProcessorList:
    """What a generation config does to logits before it samples, in the order of `generate`; None is off."""
    made = LogitsProcessorList()
    if config.temperature is not None and config.temperature != 1.0:
        made.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        made.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        made.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        made.append(MinPLogitsWarper(config.min_p))
    if config.typical_p is not None and config.typical_p < 1.0:
        made.append(TypicalLogitsWarper(config.typical_p))
    if config.epsilon_cutoff:
        made.append(EpsilonLogitsWarper(config.epsilon_cutoff))
    if config.eta_cutoff:
        made.append(EtaLogitsWarper(config.eta_cutoff))
    return made
