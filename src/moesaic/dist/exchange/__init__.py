"""How tokens travel between ranks: collectives that the backward pass runs the other way."""

from moesaic.dist.exchange.traffic import Traffic, TrafficCount, ranks_per_node

__all__ = ["Traffic", "TrafficCount", "ranks_per_node"]
