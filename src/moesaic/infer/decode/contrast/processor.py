"""The contrast of two passes as a logits processor, and its place among others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import LogitNormalization, LogitsProcessor, LogitsProcessorList, WatermarkLogitsProcessor

from moesaic.errors import ConfigError
from moesaic.infer.consistency.row_sampler import RowSampler
from moesaic.infer.decode.contrast.passes import Passes
from moesaic.infer.decode.contrast.scores import contrast

EosBan = Literal["before_mask", "official"]


@dataclass(frozen=True)
class Strength:
    """How a row's passes are set against each other.

    Attributes:
        alpha, beta: see `scores.contrast`.
        strong_temperature, weak_temperature: logits are divided by these before anything else.
        eos_ban: whether, and in which order, end-of-sequence tokens are ruled out.
    """

    alpha: float
    beta: float
    strong_temperature: float = 1.0
    weak_temperature: float = 1.0
    eos_ban: EosBan | None = None


class ContrastProcessor(LogitsProcessor):
    """Strong logits come in, contrasted ones go out.

    Args:
        passes: have the weak logits of the step.
        rows: strength of each row, or None for rows without a weak pass.
        eos_B: end-of-sequence tokens.
        log_probabilities: whether scores are to be log-probabilities, as beam search adds them up.
    """

    def __init__(
        self, passes: Passes, rows: Sequence[Strength | None], eos: Sequence[int], *, log_probabilities: bool
    ) -> None:
        self._passes, self._eos, self._log_probabilities = passes, list(eos), log_probabilities
        contrasted = [row for row in rows if row is not None]
        # Rows of one strength together: their places in the batch, and among those that have a weak pass.
        self._groups = [
            (
                strength,
                torch.tensor([place for place, row in enumerate(rows) if row == strength]),
                torch.tensor([place for place, row in enumerate(contrasted) if row == strength]),
            )
            for strength in dict.fromkeys(contrasted)
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V), of which rows with a weak pass are replaced.

        Raises:
            ConfigError: if a row has no token left.
        """
        if not self._groups:
            return scores
        scores = scores.clone()
        for strength, row_G, weak_G in self._groups:
            row_G, weak_G = row_G.to(scores.device), weak_G.to(self._passes.weak_WV.device)
            weak_GV = self._passes.weak_WV.index_select(0, weak_G).to(scores.device)
            scores[row_G] = self._contrasted(strength, scores.index_select(0, row_G), weak_GV)
        return scores

    def _contrasted(self, strength: Strength, strong_GV: Tensor, weak_GV: Tensor) -> Tensor:
        if strength.eos_ban == "before_mask":
            strong_GV[:, self._eos] = -torch.inf
        found_GV = contrast(
            strong_GV / strength.strong_temperature,
            weak_GV.float() / strength.weak_temperature,
            alpha=strength.alpha,
            beta=strength.beta,
        )
        if strength.eos_ban == "official":
            found_GV[:, self._eos] = -torch.inf
            if bool((found_GV == -torch.inf).all(-1).any()):
                raise ConfigError(
                    "eos_ban",
                    "official",
                    "leaves no token: the end of the sequence was the only plausible one, and it is ruled out after the mask",
                    "use eos_ban='before_mask', or let sequences end",
                )
        return found_GV.log_softmax(-1) if self._log_probabilities else found_GV


# Change or draw from the scores that tokens are finally chosen by, so they come after the contrast.
_FINAL = (RowSampler, LogitNormalization, WatermarkLogitsProcessor)


def with_contrast(processors: LogitsProcessorList, contrasting: LogitsProcessor) -> LogitsProcessorList:
    """All processors in their order: those that rule tokens out or penalise them act on the strong logits, as `generate`
    has it for processors of its callers, and temperature, top-k, top-p and the like on the contrast."""
    first = next((place for place, processor in enumerate(processors) if _final(processor)), len(processors))
    return LogitsProcessorList([*processors[:first], contrasting, *processors[first:]])


def _final(processor: LogitsProcessor) -> bool:
    return isinstance(processor, _FINAL) or type(processor).__name__.endswith("Warper")
