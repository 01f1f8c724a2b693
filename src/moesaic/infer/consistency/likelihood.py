"""Log-probabilities of given tokens, in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.errors import ConfigError
from moesaic.infer.consistency.sample import Sample, check_inputs, check_positions


@dataclass(frozen=True)
class Continuation:
    """Tokens to score, and those before them.

    Attributes:
        ids: all tokens.
        start: place of the first that is scored, at least 1.
    """

    ids: tuple[int, ...]
    start: int


class Logits(Protocol):
    """Says next-token logits (B, S, V) of a forward pass' inputs; of the last places only where these ask for that."""

    def __call__(self, model: PreTrainedModel, inputs: Mapping[str, Any], /) -> Tensor: ...


def own_logits(model: PreTrainedModel, inputs: Mapping[str, Any], /) -> Tensor:
    """The model's own."""
    return model(**inputs).logits


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, rows: Sequence[Continuation], *, batch_size: int = 8, logits: Logits = own_logits
) -> list[tuple[float, ...]]:
    """The log-probability of every scored token given all tokens before it, in nats; float32 sums.

    Rows are batched by length, padded on the right, where causal models don't look; results come in the order given
    and equal those of one row at a time up to rounding.

    Args:
        model: any causal language model.
        rows: tokens to score.
        batch_size: rows in a batch.
        logits: says the distributions; `DecodingSpec.logits` those of a decoding.

    Raises:
        ConfigError: if a row has nothing before the scored tokens, or more tokens than the model has positions.
    """
    check_inputs(model)
    for row in rows:
        if row.start < 1:
            raise ConfigError(
                "start", row.start, "leaves nothing to predict the first token from", "begin with a token"
            )
        check_positions(model, len(row.ids))
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    scores: dict[int, tuple[float, ...]] = {}
    training = model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            scores.update(zip(batch, _score(model, [rows[index] for index in batch], logits), strict=True))
    finally:
        model.train(training)
    return [scores[index] for index in range(len(rows))]


def mean_log_probability(model: PreTrainedModel, *, batch_size: int = 8) -> Callable[[Sequence[Sample]], list[float]]:
    """A scorer of samples: the mean log-probability of their tokens under `model` itself, whatever decoded them.

    The model reads samples once more, so that any decoding can be scored, and by the untempered distribution.
    """

    def score(samples: Sequence[Sample]) -> list[float]:
        rows = [Continuation(sample.prompt_ids + sample.ids, len(sample.prompt_ids)) for sample in samples]
        found = log_likelihoods(model, rows, batch_size=batch_size)
        return [sum(tokens) / len(tokens) if tokens else 0.0 for tokens in found]

    return score


def _score(model: PreTrainedModel, rows: list[Continuation], logits: Logits) -> list[tuple[float, ...]]:
    length = max(len(row.ids) for row in rows)
    ids_BS = torch.tensor([[*row.ids, *[0] * (length - len(row.ids))] for row in rows], device=model.device)
    mask_BS = torch.tensor([[1] * len(row.ids) + [0] * (length - len(row.ids)) for row in rows], device=model.device)
    first = min(row.start for row in rows) - 1  # logits before it are of no use
    keeps = "logits_to_keep" in signature(model.forward).parameters
    keep = {"logits_to_keep": length - first} if keeps else {}
    inputs = {"input_ids": ids_BS, "attention_mask": mask_BS, "use_cache": False, **keep}
    logits_BSV = logits(model, inputs)
    skipped = length - logits_BSV.shape[1]
    scores = []
    for row, logits_SV, ids_S in zip(rows, logits_BSV, ids_BS, strict=True):
        end = len(row.ids)
        log_p_SV = logits_SV[row.start - 1 - skipped : end - 1 - skipped].float().log_softmax(-1)
        scores.append(tuple(log_p_SV.gather(1, ids_S[row.start : end, None])[:, 0].tolist()))
    return scores


def likelihood_weights(model: PreTrainedModel, *, batch_size: int = 8) -> Callable[[Sequence[Sample]], list[float]]:
    """Weights of samples in a vote: exp of the mean log-probability, so at most 1 (Wang et al., normalised weighted sum)."""
    score = mean_log_probability(model, batch_size=batch_size)
    return lambda samples: [math.exp(value) for value in score(samples)]
