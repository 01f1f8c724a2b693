"""The routing of held-out text, domain by domain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from moesaic.trace.record import Keep, RoutingTrace, record

_LABELS = ("modality_ids", "task_ids")  # what some routers look at


@torch.no_grad()
def trace_batches(
    network: PreTrainedModel,
    batches: Mapping[str, Iterable[Mapping[str, Any]]],
    *,
    max_tokens: int,
    keep: Keep = "tokens",
    tokenizer: Any = None,
) -> RoutingTrace:
    """Record the routing of about `max_tokens` tokens of each domain.

    Args:
        network: a moesaic model, or any MoE model of transformers that `record` takes.
        batches: batches of the data room, with `input_ids` and `document_ids` (B, S), by domain.
        max_tokens: reading a domain stops with the batch that reaches this many.
        keep: as for `record`.
        tokenizer: as for `record`.
    """
    with record(network, keep=keep, tokenizer=tokenizer) as trace:
        for domain, found in batches.items():
            seen = 0
            with trace.domain(domain):
                for batch in found:
                    real_BT = (batch["document_ids"] >= 0).to(network.device)
                    input_ids = batch["input_ids"].to(network.device)
                    labels = {name: batch[name].to(network.device) for name in _LABELS if name in batch}
                    network(input_ids=input_ids, attention_mask=real_BT.long(), use_cache=False, **labels)
                    seen += int(real_BT.sum())
                    if seen >= max_tokens:
                        break
    return trace
