"""Measurements that several experiments take of a trained arm, all on held-out text."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor

from moesaic.layer import RoutingContext, max_violation, routing_entropy
from moesaic.papers.experiment import Trained
from moesaic.trace import RoutingTrace, domain_information, trace_batches
from moesaic.train import evaluate, overall
from moesaic.train.objective import model_inputs

TRACED_TOKENS = 8192
"""Tokens of each domain that routing is looked at on."""


def loss(trained: Trained) -> float:
    """Validation loss over all domains in nats, of the model as it is now: interventions count."""
    batches = trained.data.validation_batches()
    return overall(evaluate(trained.model, batches, max_batches=trained.run.train.eval_batches)).loss


def trace(trained: Trained) -> RoutingTrace:
    """Loads of every layer by domain, over `TRACED_TOKENS` of each domain."""
    batches = trained.data.validation_batches()
    return trace_batches(trained.model, batches, max_tokens=TRACED_TOKENS, keep="counts")


def balance(traced: RoutingTrace) -> dict[str, float]:
    """Load over layers: `max_violation` mean and worst, `load_entropy`, and `domain_information` of the picks."""
    layers = traced.layers.values()
    violation = [float(max_violation(layer.load_N)) for layer in layers]
    return {
        "max_violation": statistics.fmean(violation),
        "max_violation.worst": max(violation),
        "load_entropy": statistics.fmean(float(routing_entropy(layer.load_N)) for layer in layers),
        "domain_information": statistics.fmean(domain_information(layer.domain_loads) for layer in layers),
    }


@torch.no_grad()
def contexts(trained: Trained, max_tokens: int = TRACED_TOKENS) -> Iterator[RoutingContext]:
    """The routing of held-out batches, about `max_tokens` tokens of each domain."""
    for batches in trained.data.validation_batches().values():
        seen = 0
        for batch in batches:
            inputs = model_inputs(batch, trained.model.device)
            inputs.pop("labels")
            inputs["attention_mask"] = (batch["document_ids"] >= 0).long().to(trained.model.device)
            yield trained.model(**inputs, use_cache=False, output_routing=True).routing
            seen += int(inputs["attention_mask"].sum())
            if seen >= max_tokens:
                break


def scores_by_layer(trained: Trained, max_tokens: int = TRACED_TOKENS) -> dict[int, Tensor]:
    """Scores of every router for the same held-out tokens, float32 (T, N) on the CPU, by layer; padding left out."""
    found: dict[int, list[Tensor]] = {}
    for context in contexts(trained, max_tokens):
        for layer, routing in context.records.items():
            scores_TN = routing.scores_TN if context.mask_T is None else routing.scores_TN[context.mask_T]
            found.setdefault(layer, []).append(scores_TN.float().cpu())
    return {layer: torch.cat(chunks) for layer, chunks in found.items()}


def layer_pairs(layers: dict[int, Tensor]) -> Iterator[tuple[int, int]]:
    """All pairs of two MoE layers, the lower first."""
    return itertools.combinations(sorted(layers), 2)
