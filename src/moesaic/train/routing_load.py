"""Load of the MoE layers over several forward passes, from the routing records that they leave anyway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moesaic.layer import LayerLoad, RoutingContext, all_reduce_loads, loads_of, max_violation, routing_entropy

# Picks for each expert below which a share of experts without any says little.
_JUDGED = 8


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


@dataclass(frozen=True)
class LayerStatistics:
    """Load of one MoE layer over some steps.

    Attributes:
        load: picks that each expert computed.
        max_violation: largest load over the mean load, minus 1; 0 is balanced, N / K - 1 is collapse.
        entropy: of the load, over log N: 1 is balanced, 0 is one expert for all.
        unused_share: share of experts that computed nothing.
        drop_rate: share of the picks that a capacity dropped.
        null_share: share of the selections that were null experts.
        judged: whether there were picks enough to tell an unused expert from a rare one, 8 for each expert.
    """

    load: tuple[int, ...]
    max_violation: float
    entropy: float
    unused_share: float
    drop_rate: float
    null_share: float
    judged: bool

    @classmethod
    def of(cls, load: LayerLoad) -> LayerStatistics:
        """Of a load."""
        load_N = load.load_N.cpu()
        picks = int(load.chosen_M.sum())
        return cls(
            load=tuple(load_N.tolist()),
            max_violation=float(max_violation(load_N)),
            entropy=float(routing_entropy(load_N)) if load_N.numel() > 1 else 1.0,
            unused_share=float((load_N == 0).double().mean()),
            drop_rate=float(load.drop_rate),
            null_share=float(load.null_share),
            judged=picks >= _JUDGED * load_N.numel(),
        )


def statistics_of(loads: Mapping[int, LayerLoad]) -> dict[int, LayerStatistics]:
    """Statistics by layer."""
    return {layer: LayerStatistics.of(load) for layer, load in sorted(loads.items())}


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
