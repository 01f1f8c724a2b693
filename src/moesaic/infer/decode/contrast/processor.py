"""The contrast of two passes as a logits processor, and its place among others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    WatermarkLogitsProcessor,
)

from moesaic.errors import ConfigError
from moesaic.infer.decode.contrast.passes import Passes
from moesaic.infer.decode.contrast.scores import contrast, difference
from moesaic.infer.decode.row_sampler import RowSampler

EosBan = Literal["before_mask", "official"]


@dataclass(frozen=True)
class Strength:
    """How a row's passes are set against each other.

    Attributes:
        alpha, beta: see `scores.contrast`; no beta is `scores.difference`.
        strong_temperature, weak_temperature: logits are divided by these before anything else.
        eos_ban: whether, and in which order, end-of-sequence tokens are ruled out.
    """

    alpha: float
    beta: float | None
    strong_temperature: float = 1.0
    weak_temperature: float = 1.0
    eos_ban: EosBan | None = None


class EndedRows(StoppingCriteriaList):
    """Criteria that remember which rows they have ended, as the loops for greedy decoding and sampling do.

    Attributes:
        ended_B: bool; None before the first step.
    """

    ended_B: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        found_B = super().__call__(input_ids, scores, **kwargs)
        self.ended_B = found_B if self.ended_B is None else self.ended_B | found_B
        return found_B


class ContrastProcessor(LogitsProcessor):
    """Strong logits come in, contrasted ones go out.

    Args:
        passes: have the weak logits of the step.
        rows: strength of each row, or None for rows without a weak pass.
        eos: end-of-sequence tokens.
        log_probabilities: whether scores are to be log-probabilities, as beam search adds them up.
        ended: says which rows have ended, whose tokens are overwritten; None where rows are no sequences (beams).
    """

    def __init__(
        self,
        passes: Passes,
        rows: Sequence[Strength | None],
        eos: Sequence[int],
        *,
        log_probabilities: bool,
        ended: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        self._passes, self._eos, self._log_probabilities = passes, list(eos), log_probabilities
        self._ended = ended
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
            found_GV = self._contrasted(strength, scores.index_select(0, row_G), weak_GV)
            if strength.eos_ban == "official":
                self._ban_last(found_GV, row_G)
            scores[row_G] = found_GV.log_softmax(-1) if self._log_probabilities else found_GV
        return scores

    def _contrasted(self, strength: Strength, strong_GV: Tensor, weak_GV: Tensor) -> Tensor:
        if strength.eos_ban == "before_mask":
            strong_GV[:, self._eos] = -torch.inf
        strong_GV, weak_GV = strong_GV / strength.strong_temperature, weak_GV.float() / strength.weak_temperature
        if strength.beta is None:
            return difference(strong_GV, weak_GV, alpha=strength.alpha)
        return contrast(strong_GV, weak_GV, alpha=strength.alpha, beta=strength.beta)

    def _ban_last(self, found_GV: Tensor, row_G: Tensor) -> None:
        """Rule the end of sequences out of what is plausible."""
        found_GV[:, self._eos] = -torch.inf
        empty_G = (found_GV == -torch.inf).all(-1)
        ended_B = self._ended()
        if ended_B is not None:
            ended_G = ended_B.to(row_G.device)[row_G]
            found_GV[empty_G & ended_G] = 0.0  # anything that a token can be drawn from
            empty_G = empty_G & ~ended_G
        if bool(empty_G.any()):
            raise ConfigError(
                "eos_ban",
                "official",
                "leaves no token: the end of the sequence was the only plausible one, and it is ruled out after the mask",
                "use eos_ban='before_mask', or let sequences end",
            )


# Change or draw from the scores that tokens are finally chosen by, so they come after the contrast.
_FINAL = (RowSampler, LogitNormalization, WatermarkLogitsProcessor)


def with_contrast(
    processors: LogitsProcessorList, contrasting: LogitsProcessor, *, penalise_contrast: bool = False
) -> LogitsProcessorList:
    """All processors in their order: those that rule tokens out or penalise them act on the strong logits, as `generate`
    has it for processors of its callers, and temperature, top-k, top-p and the like on the contrast.

    Args:
        processors: as `generate` made them.
        contrasting: turns strong logits into contrasted ones.
        penalise_contrast: the penalty for repetition acts on the contrast too.
    """
    late = [penalise_contrast and isinstance(processor, RepetitionPenaltyLogitsProcessor) for processor in processors]
    first = next((place for place, processor in enumerate(processors) if _final(processor)), len(processors))
    before = [processor for processor, is_late in zip(processors[:first], late, strict=False) if not is_late]
    between = [processor for processor, is_late in zip(processors[:first], late, strict=False) if is_late]
    return LogitsProcessorList([*before, contrasting, *between, *processors[first:]])


def _final(processor: LogitsProcessor) -> bool:
    return isinstance(processor, _FINAL) or type(processor).__name__.endswith("Warper")
