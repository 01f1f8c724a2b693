"""Null experts: how much of the routing goes nowhere on purpose, and for which tokens."""

from __future__ import annotations

import math

import numpy as np

from moesaic.trace.metrics import nulls_by_frequency
from moesaic.trace.plots import Bars, HeatMap
from moesaic.trace.report.parts import Column, Figure, Section, Table, matrix
from moesaic.trace.report.subject import Subject

BUCKETS = 8


def section(subject: Subject) -> Section | None:
    """Share of null experts by layer and by frequency of the token; None without null experts."""
    layers = [layer for layer in subject.layers if layer.num_null]
    if not layers or not subject.has_tokens:
        return None
    found = [nulls_by_frequency(layer, buckets=BUCKETS) for layer in layers]
    names = [str(layer.layer) for layer in layers]
    columns = [
        Column("layer"),
        Column("null share", ".2%"),
        Column("balanced", ".2%"),
        Column("experts per token", ".3f"),
        Column("null experts"),
    ]
    rows = [
        [layer.layer, result.value, result.reference, result.values["experts_per_token"], layer.num_null]
        for layer, result in zip(layers, found, strict=True)
    ]
    balanced = float(np.mean([result.reference or 0.0 for result in found]))
    widest = max(found, key=lambda result: len(result.table["least"]))
    buckets = len(widest.table["least"])
    values_LB = np.full((len(layers), buckets), math.nan)
    for row, result in enumerate(found):
        values_LB[row, : len(result.table["value"])] = result.table["value"].numpy()
    ranges = [f"{least}+" for least in widest.table["least"].tolist()]
    return Section(
        "nulls",
        "Null experts",
        "A selection of a null expert computes nothing: the token spends less.",
        [
            Figure(
                "nulls",
                "Share of null experts by layer",
                "Of all selections, those of null experts. The line is balanced use of all experts, null ones included.",
                Table("Null experts by layer", columns, rows),
                Bars(
                    np.array([result.value for result in found]),
                    "layer",
                    "share of the selections",
                    names,
                    reference=(balanced, "balanced"),
                    height=150.0,
                ),
            ),
            Figure(
                "nulls-by-frequency",
                "Null experts by frequency of the token",
                "Token ids sorted by how often they occur, rare ones left, in groups with about as many occurrences each. "
                "Darker towards the right: the router spends less on frequent tokens.",
                matrix("Share of null experts, by occurrences of the token id from", "layer", names, ranges, values_LB),
                HeatMap(values_LB, "layer", "occurrences of the token id", "null share", names, ranges),
            ),
        ],
    )
