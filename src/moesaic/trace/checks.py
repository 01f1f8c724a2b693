"""Whether a trace fits a model, and a tokenizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from moesaic.errors import TraceError
from moesaic.trace.facts import facts_of
from moesaic.trace.header import tokenizer_fingerprint
from moesaic.trace.rows import RoutingLog


def check_model(log: RoutingLog, model: nn.Module) -> None:
    """Check that a trace is of this model, or of one with the same layers, experts and vocabulary.

    Raises:
        TraceError: names the first thing in which they differ, with both values.
        UnsupportedModel: if the model has no routing to compare.
    """
    traced, here = log.header, facts_of(model)

    def differs(what: str, there: object, found: object) -> TraceError:
        return TraceError(
            f"the trace is of another model: {what} is {there!r} in the trace of {traced.model or 'a model'} and "
            f"{found!r} in {here.model}; give the model that was traced, or record this one"
        )

    for name in ("model_type", "vocab_size"):
        there, found = getattr(traced, name), getattr(here, name)
        if there and found and there != found:
            raise differs(name, there, found)
    for index, facts in sorted(traced.layers.items()):
        if index not in here.layers:
            raise differs("the list of MoE layers", sorted(traced.layers), sorted(here.layers))
        for name in ("num_experts", "num_null", "router"):
            there, found = getattr(facts, name), getattr(here.layers[index], name)
            if there != found:
                raise differs(f"{name} of layer {index}", there, found)


def check_tokenizer(log: RoutingLog, tokenizer: Any) -> None:
    """Check that a tokenizer made the ids of a trace; a trace that was recorded without one fits any.

    Raises:
        TraceError: if it is another one.
    """
    traced, here = log.header.tokenizer, tokenizer_fingerprint(tokenizer)
    if traced and traced != here:
        raise TraceError(
            f"the trace was made with another tokenizer: its fingerprint is {traced} in the trace and {here} for "
            f"{getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}; give the tokenizer of the model "
            "that was traced"
        )
