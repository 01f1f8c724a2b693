"""What a model says of itself in the header of a trace."""

from __future__ import annotations

from importlib.metadata import version

from torch import nn

from moesaic.hf.routing_source import RoutingSource, routing_source
from moesaic.trace.header import LayerFacts, TraceHeader


def facts_of(model: nn.Module | RoutingSource) -> TraceHeader:
    """The header of a trace of `model`, which need not have run.

    Raises:
        UnsupportedModel: if it has no MoE layer or its routing can't be heard.
    """
    source = routing_source(model) if isinstance(model, nn.Module) else model
    config = source.model.config.get_text_config()
    return TraceHeader(
        model=source.model.config.name_or_path or type(source.model).__name__,
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        layers={index: LayerFacts(**vars(layer)) for index, layer in source.layers().items()},
        moesaic=version("moesaic"),
    )
