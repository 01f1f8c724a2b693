"""Multiple choice: log-likelihoods of the choices after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.infer.consistency.likelihood import Continuation, Logits, log_likelihoods, own_logits
from moesaic.infer.consistency.sample import encode
from moesaic.infer.tasks.schema import ChoiceItem


@dataclass(frozen=True)
class _Candidates:
    rows: list[Continuation]
    item: ChoiceItem


def answer_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ChoiceItem],
    *,
    batch_size: int = 8,
    logits: Logits = own_logits,
) -> list[dict[str, Any]]:
    """What the model makes of each item, by the distributions that `logits` says.

    Returns:
        For each item `correct`, `predicted` and `right` (numbers of choices; of equal ones the first is predicted),
        `log_likelihoods` and `scored_tokens` of each choice, and `prompt_tokens` (read before the scored ones, for all).
    """
    candidates = [_Candidates(tokenised(tokenizer, item), item) for item in items]
    flat = [row for found in candidates for row in found.rows]
    scores = iter(log_likelihoods(model, flat, batch_size=batch_size, logits=logits))
    return [_answered(found, [sum(next(scores)) for _ in found.rows]) for found in candidates]


def tokenised(tokenizer: PreTrainedTokenizerBase, item: ChoiceItem) -> list[Continuation]:
    """The tokens of prompt and choice together, for each choice, and where scoring starts.

    A token may reach over the end of the prompt, as where the prompt ends with a space and the tokenizer has words
    with a space in front. So prompt and choice are split into tokens as one text, and scoring starts at the first token
    that differs from the prompt's own, or between choices' tokens of the prompt: all choices are scored from the same place.
    """
    begun = encode(tokenizer, item.prompt)
    texts = [encode(tokenizer, item.prompt + choice) for choice in item.choices]
    start = min(len(begun), *(len(ids) - 1 for ids in texts))
    while any(ids[:start] != begun[:start] for ids in texts):
        start -= 1
    if not start:  # the first token is scored too, as the first of a document
        first = encode(tokenizer, "")
        texts, start = [first + ids for ids in texts], len(first)
    return [Continuation(tuple(ids), start) for ids in texts]


def _answered(found: _Candidates, sums: list[float]) -> dict[str, Any]:
    item = found.item
    lengths = {
        "none": [1] * len(sums),
        "tokens": [len(row.ids) - row.start for row in found.rows],
        "characters": [len(choice) for choice in item.choices],
        "bytes": [len(choice.encode()) for choice in item.choices],
    }[item.length]
    scores = [total / length for total, length in zip(sums, lengths, strict=True)]
    predicted = max(range(len(scores)), key=scores.__getitem__)
    return {
        "correct": predicted == item.right,
        "predicted": predicted,
        "right": item.right,
        "log_likelihoods": sums,
        "scored_tokens": [len(row.ids) - row.start for row in found.rows],
        "prompt_tokens": sum(row.start for row in found.rows),
    }
