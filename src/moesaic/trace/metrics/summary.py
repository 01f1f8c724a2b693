"""Every metric that counts alone can give, of every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from moesaic.trace.counts.routing import LayerCounts, RoutingCounts
from moesaic.trace.metrics.coactivation import coactivation_table, layer_flow
from moesaic.trace.metrics.deviation import routing_deviation
from moesaic.trace.metrics.domains import domain_specialisation
from moesaic.trace.metrics.drops import drop_rates
from moesaic.trace.metrics.frequency import nulls_by_frequency
from moesaic.trace.metrics.information import group_information
from moesaic.trace.metrics.load import load_balance
from moesaic.trace.metrics.result import MetricResult
from moesaic.trace.metrics.vocabulary import vocabulary_specialisation

_GROUPS = ("token", "previous", "next", "predicted", "position", "domain", "turn", "modality")
_IDS: tuple[Literal["token", "next", "predicted", "previous"], ...] = ("token", "next", "predicted", "previous")


def summarise(counts: RoutingCounts, *, min_count: int = 32) -> list[MetricResult]:
    """All metrics of all layers that the counted tables allow, for a report or a file.

    Load; deviation and information of every grouping; domain and vocabulary specialisation; co-activation; flow; drops by
    place, position, turn and domain; null share by frequency.

    Args:
        counts: of `count`.
        min_count: tokens of a group at least, for deviation by token ids and for vocabulary specialisation; positions,
            domains and information take all.
    """
    found: list[MetricResult] = []
    for layer in counts.layers.values():
        found += _of_layer(layer, counts, min_count)
    found += [layer_flow(counts, *pair) for pair in counts.flow]
    return found


def _of_layer(layer: LayerCounts, counts: RoutingCounts, min_count: int) -> list[MetricResult]:
    names = counts.header.domains
    found = [load_balance(layer), load_balance(layer, first=True)]
    for group in (name for name in _GROUPS if name in layer.groups):
        found.append(routing_deviation(layer, group, min_count=min_count if group in _IDS else 1))
        found.append(group_information(layer, group))
        found.append(group_information(layer, group, first=True))
    if "domain" in layer.groups:
        found.append(domain_specialisation(layer, names=names, blocks=counts.blocks))
    found += [vocabulary_specialisation(layer, ids=ids, min_count=min_count) for ids in _IDS if ids in layer.groups]
    pairs: tuple[tuple[bool, Callable[[], MetricResult]], ...] = (
        (layer.pairs_MM is not None, lambda: coactivation_table(layer)),
        (layer.adjacent_MM is not None, lambda: coactivation_table(layer, adjacent_only=True)),
        (layer.num_null > 0 and "token" in layer.groups, lambda: nulls_by_frequency(layer)),
    )
    found += [metric() for wanted, metric in pairs if wanted]
    for by in ("place", "position", "turn"):
        if by in layer.drops:
            found.append(drop_rates(layer, by=by))
    if "place" in layer.drops:
        found.append(drop_rates(layer, by="domain", names=names))
    return found
