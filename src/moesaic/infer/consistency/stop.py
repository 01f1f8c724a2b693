"""Ending a row of a batch at a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria


class StopText(StoppingCriteria):
    """Ends a row as soon as what it generated holds one of some texts.

    Unlike transformers' `stop_strings`, text of the prompt never counts, not even its end together with the first new
    tokens: what is cut off here is then found again in the generated text.

    Args:
        tokenizer: decodes.
        stop: the texts, none of them empty.
        prompt_length: tokens of the padded prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int) -> None:
        self._tokenizer, self._stop, self._prompt_length = tokenizer, tuple(stop), prompt_length
        # A token has at least a byte of text, but for special ones; what slips by is cut off afterwards.
        self._reach = max((len(text.encode()) for text in stop), default=0) + 8

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Which rows (B,) end."""
        start = max(self._prompt_length, input_ids.shape[1] - self._reach)
        texts = [str(self._tokenizer.decode(row, skip_special_tokens=True)) for row in input_ids[:, start:].tolist()]
        ends = [any(stop in text for stop in self._stop) for text in texts]
        return torch.tensor(ends, dtype=torch.bool, device=input_ids.device)


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first stop text in it, and whether there was one."""
    places = [place for place in (text.find(end) for end in stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)
