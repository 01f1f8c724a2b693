"""Load of the MoE layers over several forward passes, from the routing records that they leave anyway."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moesaic.layer import LayerLoad, RoutingContext, all_reduce_loads, loads_of, max_violation


class RoutingLoad:
    """Sums loads, layer by layer, until they are taken."""

    def __init__(self) -> None:
        self._loads: dict[int, LayerLoad] = {}

    @torch.no_grad()
    def add(self, context: RoutingContext) -> None:
        """Count the picks of one forward pass."""
        for layer, load in loads_of(context).items():
            self._loads[layer] = self._loads[layer] + load if layer in self._loads else load

    def take(self) -> dict[int, LayerLoad]:
        """Loads by layer since the last call, summed over the ranks of torch.distributed, which must all call it."""
        loads, self._loads = self._loads, {}
        return all_reduce_loads(loads)


def load_metrics(loads: Mapping[int, LayerLoad]) -> dict[str, dict[int, float]]:
    """`max_violation`, `drop_rate` and `null_share` by layer; the latter two without layers where they are 0."""
    metrics = {"max_violation": {layer: float(max_violation(load.load_N)) for layer, load in loads.items()}}
    for name in ("drop_rate", "null_share"):
        values = {layer: float(getattr(load, name)) for layer, load in loads.items()}
        metrics[name] = {layer: value for layer, value in values.items() if value}
    return metrics


def over_layers(values: Mapping[int, float]) -> dict[str, float]:
    """Mean, largest and the layer that has it; empty without layers."""
    if not values:
        return {}
    worst_layer = max(values, key=values.__getitem__)
    mean = sum(values.values()) / len(values)
    return {"mean": mean, "worst": values[worst_layer], "worst_layer": worst_layer}
