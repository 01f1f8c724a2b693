"""Cross entropy and perplexity on held-out text, by domain."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from moesaic.dist.process import Process
from moesaic.train.objective import inputs_known_to, model_inputs, predicted_tokens
from moesaic.train.ranks import OneProcess, Ranks


@dataclass(frozen=True)
class Evaluation:
    """Result on one domain.

    Attributes:
        loss: mean cross entropy of a predicted token, in nats.
        perplexity: its exponential.
        tokens: number of predicted tokens.
    """

    loss: float
    perplexity: float
    tokens: int

    @classmethod
    def from_sum(cls, total: float, tokens: int) -> Evaluation:
        """From the cross entropy summed over `tokens` predictions."""
        loss = total / tokens if tokens else math.nan
        # math.exp raises above this; a model that bad has no useful perplexity.
        return cls(loss, math.exp(loss) if not loss > 700 else math.inf, tokens)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    batches_by_domain: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    max_batches: int | None = None,
    bf16: bool = False,
    ranks: Ranks | None = None,
) -> dict[str, Evaluation]:
    """Evaluate a causal language model; its mode (training or not) is as before afterwards.

    Args:
        model: any HF causal language model.
        batches_by_domain: batches with `input_ids` and `labels` (B, S), by domain.
        max_batches: batches to take from each domain; None for all.
        bf16: compute under bfloat16 autocast.
        ranks: processes that share the model; all walk the same batches, and each takes its rows. None for one process.

    Returns:
        Result by domain; `nan` where a domain has no token to predict.
    """
    ranks = ranks or OneProcess(model)
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            return {
                domain: _evaluate_domain(model, itertools.islice(batches, max_batches), ranks)
                for domain, batches in batches_by_domain.items()
            }
    finally:
        model.train(was_training)


def overall(evaluations: Mapping[str, Evaluation]) -> Evaluation:
    """All domains together, each predicted token counted once."""
    counted = [evaluation for evaluation in evaluations.values() if evaluation.tokens]
    tokens = sum(evaluation.tokens for evaluation in counted)
    return Evaluation.from_sum(sum(evaluation.loss * evaluation.tokens for evaluation in counted), tokens)


def _evaluate_domain(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], ranks: Ranks) -> Evaluation:
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        predicted = predicted_tokens([batch])
        if predicted:
            rows = _rows_of(batch, ranks.process)
            inputs = inputs_known_to(model, model_inputs(rows, model.device))
            output = model(**inputs, num_items_in_batch=predicted, use_cache=False)
            total += output.loss.double().cpu() * predicted
            tokens += predicted
    return Evaluation.from_sum(ranks.sum(total).item(), tokens)


def _rows_of(batch: Mapping[str, Any], process: Process) -> Mapping[str, Any]:
    """The rows of a batch that a process evaluates, filled up to equally many with rows of which nothing is predicted.

    Every process must run the model as often and on as many tokens as others: its layers are spread over all of them.
    """
    if process.world == 1:
        return batch
    count = len(batch["input_ids"])
    each = -(-count // process.world)
    row = torch.arange(process.rank * each, (process.rank + 1) * each)
    rows = {name: value[row.clamp(max=count - 1)] for name, value in batch.items()}
    return {**rows, "labels": rows["labels"].masked_fill((row >= count).unsqueeze(1), -100)}
