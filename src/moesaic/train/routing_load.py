"""Expert load over several forward passes, from the routing records that they leave anyway."""

from __future__ import annotations

from torch import Tensor

from moesaic.layer import RoutingContext, expert_load, max_violation


class RoutingLoad:
    """Sums picks of each expert, layer by layer, until they are taken."""

    def __init__(self) -> None:
        self._load: dict[int, Tensor] = {}

    def add(self, context: RoutingContext) -> None:
        """Count the picks of one forward pass."""
        for layer, routing in context.records.items():
            load_N = expert_load(routing, context.mask_T)
            self._load[layer] = self._load[layer] + load_N if layer in self._load else load_N

    def take(self) -> dict[int, Tensor]:
        """Picks by layer, int64 (N,) each, since the last call."""
        load, self._load = self._load, {}
        return load

    def take_max_violation(self) -> dict[int, float]:
        """`max_violation` by layer since the last call; empty for a dense model."""
        return {layer: float(max_violation(load_N)) for layer, load_N in self.take().items()}
