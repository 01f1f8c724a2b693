"""Which picks a capacity drops: by layer and place, by domain, by turn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moesaic.trace.counts.routing import LayerCounts
from moesaic.trace.metrics import MetricResult, drop_rates
from moesaic.trace.plots import Bars, HeatMap, Lines, Series
from moesaic.trace.report.parts import Column, Figure, Section, Table, matrix
from moesaic.trace.report.subject import Subject

PARTS = 16
MOST_DOMAINS = 8


def section(subject: Subject) -> Section | None:
    """Drops of every layer and of single layers; None where nothing limits experts."""
    limited = [layer for layer in subject.layers if layer.limited]
    if not limited:
        return None
    figures = [_stretches(limited), _by_domain(subject, limited)]
    shown = {layer.layer for layer in subject.detailed}
    for layer in limited:
        if layer.layer in shown:
            figures += [
                _by_place(subject, layer, by) for by in ("place", "position") if by == "place" or _packed(layer)
            ]
            if "turn" in layer.drops:
                figures.append(_by_turn(layer))
    return Section(
        "drops",
        "Drops",
        "A pick is dropped when its expert is full: the token then goes without it. Rates are shares of the picks of experts.",
        figures,
        [f"Rates that rest on fewer than {30} sequences are marked in the tables.", *subject.detail_note],
    )


def _stretches(layers: list[LayerCounts]) -> Figure:
    found = [drop_rates(layer, by="place", per_domain=False, parts=PARTS, replicates=0) for layer in layers]
    values_LP = np.full((len(layers), PARTS), math.nan)
    for row, result in enumerate(found):
        values_LP[row, result.table["label"].numpy()] = result.table["value"].numpy()
    names = [str(layer.layer) for layer in layers]
    stretches = [f"{100 * part / PARTS:.0f} %" for part in range(PARTS)]
    return Figure(
        "drops",
        "Drops by layer and place",
        "Each row is a layer, from the beginning of the sequence at the left to its end. Places given out in the order of "
        "the tokens run out towards the end (OpenMoE's drop-towards-the-end).",
        matrix("Share of the picks that were dropped", "layer", names, stretches, values_LP),
        HeatMap(values_LP, "layer", "place in the sequence, from", "share of the picks", names, stretches),
    )


def _by_domain(subject: Subject, layers: list[LayerCounts]) -> Figure:
    names = subject.log.header.domains
    found = [drop_rates(layer, by="domain", names=names) for layer in layers]
    domains = sorted({name for result in found for name in result.names})
    values_LD = np.full((len(layers), len(domains)), math.nan)
    for row, result in enumerate(found):
        for name, value in zip(result.names, result.table["value"].tolist(), strict=True):
            values_LD[row, domains.index(name)] = value
    shown = [name or "(none)" for name in domains]
    rows = [
        [layer.layer, result.value, *_band(result), result.values["unserved"], *values_LD[row].tolist()]
        for row, (layer, result) in enumerate(zip(layers, found, strict=True))
    ]
    heads = ("all", "95 % from", "to", "tokens without an expert", *shown)
    return Figure(
        "drops-by-domain",
        "Drops by domain",
        "A domain that the router saw little of in training is often sent to few experts, which overflow. All: over every "
        "domain, with its 95 % band over documents drawn anew.",
        Table(
            "Share of the picks that were dropped, by domain",
            [Column("layer"), *(Column(name, ".2%") for name in heads)],
            rows,
        ),
        Bars(
            np.array([result.value for result in found]),
            "layer",
            "share of the picks",
            [str(x.layer) for x in layers],
            height=130,
        )
        if len(domains) < 2
        else HeatMap(values_LD, "layer", "domain", "share of the picks", [str(x.layer) for x in layers], shown),
    )


def _by_place(subject: Subject, layer: LayerCounts, by: Any) -> Figure:
    result = drop_rates(layer, by=by, names=subject.log.header.domains)
    rows, names = result.rows(), subject.log.header.domains
    series = [
        Series(
            names[domain] or "all",
            *(
                np.array(
                    [math.nan if row[name] is None else float(row[name]) for row in rows if row["domain"] == domain]
                )
                for name in ("label", "value", "low", "high")
            ),
        )
        for domain in sorted({row["domain"] for row in rows})
    ][:MOST_DOMAINS]
    whole = drop_rates(layer, by=by, per_domain=False, replicates=0).rows()
    behind = Series(
        "sequences",
        np.array([row["label"] for row in whole], dtype=float),
        np.array([row["count"] for row in whole], dtype=float),
    )
    where = "place in the sequence" if by == "place" else "position in the document"
    columns = [Column("domain", text=True), Column(where), Column("sequences"), Column("picks"), Column("dropped")]
    columns += [*(Column(name, ".2%") for name in ("rate", "95 % from", "to")), Column("few sequences", text=True)]
    cells = [
        [
            names[row["domain"]] or "(none)",
            *(row[name] for name in ("label", "count", "picks", "dropped", "value", "low", "high")),
            "few" if row["few"] else "",
        ]
        for row in rows
    ]
    return Figure(
        f"drops-by-{by}-layer-{layer.layer}",
        f"Drops by {where}",
        f"Share of the picks at each {where} that were dropped, a line for each domain with its 95 % band over documents "
        "drawn anew. Grey, at the right axis: the sequences that are long enough to reach there; where they are few, the "
        "rate says little.",
        Table(f"Drops by {where}", columns, cells),
        Lines(series, where, "share of the picks", behind=behind),
        layer=layer.layer,
    )


def _by_turn(layer: LayerCounts) -> Figure:
    rows = drop_rates(layer, by="turn", per_domain=False).rows()
    columns = [Column("turn"), Column("tokens"), Column("picks"), Column("dropped")]
    columns += [Column(name, ".2%") for name in ("rate", "95 % from", "to")]
    names = ("label", "tokens", "picks", "dropped", "value", "low", "high")
    return Figure(
        f"drops-by-turn-layer-{layer.layer}",
        "Drops by turn of the conversation",
        "Later turns stand later in the sequence, where places have run out.",
        Table("Drops by turn", columns, [[row[name] for name in names] for row in rows]),
        Bars(
            np.array([row["value"] if row["value"] is not None else math.nan for row in rows]),
            "turn",
            "share of the picks",
            [str(row["label"]) for row in rows],
            height=150.0,
        ),
        layer=layer.layer,
    )


def _packed(layer: LayerCounts) -> bool:
    """Whether documents begin inside sequences, so that position and place differ."""
    place, position = layer.drops.get("place"), layer.drops.get("position")
    if place is None or position is None:
        return False
    sums = [drops.by("label") for drops in (place, position)]
    return len(sums[0]) != len(sums[1]) or not bool((sums[0].dropped_G == sums[1].dropped_G).all())


def _band(result: MetricResult) -> tuple[float | None, float | None]:
    return (None, None) if result.band is None else (result.band.low, result.band.high)
