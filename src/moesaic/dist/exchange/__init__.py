"""How tokens travel between ranks: collectives that the backward pass runs the other way."""

from moesaic.dist.exchange.traffic import Traffic, TrafficCount

__all__ = ["Traffic", "TrafficCount"]
