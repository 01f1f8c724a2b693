"""Load of the experts over layers, and balance of each layer."""

from __future__ import annotations

import numpy as np

from moesaic.trace.counts.routing import LayerCounts
from moesaic.trace.metrics import load_balance
from moesaic.trace.plots import Bars, HeatMap
from moesaic.trace.report.parts import HALF, Column, Figure, Section, Table, matrix
from moesaic.trace.report.subject import Subject


def load_section(subject: Subject) -> Section:
    """Load of every expert in every layer, as it is and sorted, and one layer at a time."""
    values_LN = relative_loads(subject.layers, subject.num_experts)
    sorted_LN = -np.sort(-np.where(np.isnan(values_LN), -1.0, values_LN), axis=1)
    sorted_LN[sorted_LN < 0] = np.nan
    layers = [str(layer.layer) for layer in subject.layers]
    experts = [str(expert) for expert in range(subject.num_experts)]
    ranks = [str(rank + 1) for rank in range(subject.num_experts)]
    shape = {
        "row_title": "layer",
        "value_title": "load / mean load of the layer",
        "row_names": layers,
        "scale": "ratio",
    }
    figures = [
        Figure(
            "load",
            "Load of every expert in every layer",
            "Each row is a layer, each cell an expert: its picks over the mean of the layer. Pale is balanced, orange "
            "overloaded, blue underused; an almost black cell is an expert that no token picked. Pale rows mean that all "
            "capacity is in use. An orange cell that stays orange in training is a sign of collapse.",
            matrix("Load relative to the layer's mean", "layer", layers, experts, values_LN),
            HeatMap(values_LN, column_title="expert", column_names=experts, **shape),
        ),
        Figure(
            "load-sorted",
            "The same, sorted within each layer",
            "The busiest expert of each layer stands left. A row that goes from deep orange to deep blue is badly balanced; "
            "rows can be compared at a glance, whatever their experts are called.",
            matrix("Load relative to the layer's mean, busiest expert first", "layer", layers, ranks, sorted_LN),
            HeatMap(sorted_LN, column_title="rank of the expert by load", column_names=ranks, **shape),
        ),
        *(_layer_figure(layer) for layer in subject.detailed),
    ]
    return Section("load", "Expert load", figures=figures, notes=[*subject.special_note, *subject.detail_note])


def relative_loads(layers: list[LayerCounts], experts: int) -> np.ndarray:
    """Load over the mean by layer and expert; NaN where a layer has no such expert."""
    values_LN = np.full((len(layers), experts), np.nan)
    for row, layer in enumerate(layers):
        values_LN[row, : layer.num_experts] = load_balance(layer, replicates=0).table["relative"].numpy()
    return values_LN


def balance_section(subject: Subject) -> Section:
    """Entropy, MaxVio and Gini of every layer."""
    columns = [
        Column("layer"),
        Column("entropy", ".4f"),
        Column("MaxVio", ".4f"),
        Column("95 % from", ".4f"),
        Column("to", ".4f"),
        Column("Gini", ".4f"),
        Column("experts never picked"),
        Column("busiest expert"),
        Column("its share of the picks", ".2%"),
    ]
    rows = [_balance(layer) for layer in subject.layers]
    names = [str(layer.layer) for layer in subject.layers]

    def figure(name: str, title: str, how: str, column: int, maximum: float | None = None) -> Figure:
        table = Table(f"{title} of every layer", [columns[0], columns[column]], [[row[0], row[column]] for row in rows])
        values_L = np.array([row[column] for row in rows], dtype=float)
        return Figure(name, title, how, table, Bars(values_L, "layer", title, names, maximum, width=HALF, height=130.0))

    return Section(
        "balance",
        "Balance by layer",
        figures=[
            figure(
                "entropy",
                "Entropy of the load",
                "Divided by its largest possible value: 1 when all experts are used alike, 0 when one takes all.",
                1,
                1.0,
            ),
            figure(
                "max-violation",
                "MaxVio",
                "Load of the busiest expert over the mean, minus 1: 0 when balanced. With experts on several devices, the "
                "busiest sets the pace.",
                2,
            ),
            Figure(
                "balance",
                "All measures",
                "MaxVio with its 95 % band over documents drawn anew. Gini: 0 when all experts are used alike, towards 1 when few "
                "take all.",
                Table("Balance by layer", columns, rows),
            ),
        ],
    )


def _balance(layer: LayerCounts) -> list[int | float | None]:
    result = load_balance(layer)
    busiest = int(result.table["count"].argmax())
    band = result.band
    return [
        layer.layer,
        result.values["entropy"],
        result.value,
        *((None, None) if band is None else (band.low, band.high)),
        result.values["gini"],
        int(result.values["unused"]),
        busiest,
        float(result.table["share"][busiest]),
    ]


def _layer_figure(layer: LayerCounts) -> Figure:
    result = load_balance(layer, replicates=0)
    columns = [Column("expert"), Column("load / mean", ".3f"), Column("picks"), Column("share of the tokens", ".4f")]
    table = [result.table[name].tolist() for name in ("relative", "count", "value")]
    rows = [[expert, *values] for expert, values in enumerate(zip(*table, strict=True))]
    if layer.limited:
        columns.append(Column("dropped"))
        rows = [[*row, dropped] for row, dropped in zip(rows, layer.dropped_M.tolist(), strict=False)]
    names = [str(expert) for expert in range(layer.num_experts)]
    relative_N = result.table["relative"].numpy()
    return Figure(
        f"load-layer-{layer.layer}",
        "Load of each expert",
        "Height 1 is an equal share of the picks; 2 is twice that. Picks are counted before any was dropped.",
        Table("Load of each expert", columns, rows),
        Bars(relative_N, "expert", "load / mean load", names, reference=(1.0, "balanced")),
        layer=layer.layer,
    )
