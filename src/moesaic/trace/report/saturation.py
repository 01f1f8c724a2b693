"""How early routing is learned: checkpoints of one run on the same text, held against the last."""

from __future__ import annotations

import math

import numpy as np

from moesaic.trace.counts.count import count
from moesaic.trace.metrics import MetricResult, distribution_change, load_balance, router_saturation
from moesaic.trace.plots import HeatMap, Lines, Series
from moesaic.trace.report.parts import Column, Figure, Section, Table, matrix
from moesaic.trace.report.subject import Subject


def section(subject: Subject) -> Section | None:
    """Saturation by checkpoint and layer; None without checkpoints."""
    if not subject.checkpoints:
        return None
    found = [router_saturation(checkpoint.log, subject.log) for checkpoint in subject.checkpoints]
    figures = [_over_checkpoints(subject, found), _layers_figure(subject, found)]
    if subject.has_tokens:
        figures.append(_change_figure(subject))
    shown = {layer.layer for layer in subject.detailed}
    figures += [_layer_figure(subject, layer, found) for layer in sorted(found[0]) if layer in shown]
    return Section(
        "saturation",
        "Saturation over checkpoints",
        "The same text, routed by earlier states of the model: which share of the final picks had been decided by then?",
        figures,
        subject.detail_note,
    )


def _places(subject: Subject) -> tuple[np.ndarray, str, bool]:
    """Where checkpoints stand on the axis: their steps, or their order where steps are unknown."""
    steps = [checkpoint.step for checkpoint in subject.checkpoints]
    if all(step is not None for step in steps):
        return np.array(steps, dtype=float), "training step", max(steps) >= 100  # type: ignore[type-var]
    return np.arange(1, len(steps) + 1, dtype=float), "checkpoint", False


def _mean(found: dict[int, MetricResult], name: str = "") -> float:
    return float(np.mean([result.values[name] if name else result.value for result in found.values()]))


def _over_checkpoints(subject: Subject, found: list[dict[int, MetricResult]]) -> Figure:
    x_C, title, log_x = _places(subject)
    series = [
        Series("all picks", x_C, np.array([_mean(results) for results in found])),
        Series("first choice", x_C, np.array([_mean(results, "rank_1") for results in found])),
    ]
    chance = float(np.mean([result.reference or 0.0 for result in found[0].values()]))
    columns = [Column("checkpoint", text=True), Column("step", "d")]
    columns += [Column(name, ".4f") for name in ("all picks", "corrected", "first choice", "first choice, corrected")]
    rows = [
        [checkpoint.name, checkpoint.step, _mean(results), *(_mean(results, name) for name in _VALUES)]
        for checkpoint, results in zip(subject.checkpoints, found, strict=True)
    ]
    return Figure(
        "saturation",
        "Router saturation, mean of the layers",
        "Share of the final picks of a token that the checkpoint makes too (OLMoE's router saturation); 1 is the final "
        "routing. The dashed line is chance for all picks, K / E. A line that is high early means that routing was learned "
        "early and then kept. Corrected, in the table: 0 for chance, 1 for the final routing.",
        Table("Saturation against the last state, mean of the layers", columns, rows),
        Lines(series, title, "saturation", log_x=log_x, maximum=1.0, reference=(chance, f"chance {chance:.3g}")),
    )


_VALUES = ("corrected", "rank_1", "rank_1_corrected")


def _layers_figure(subject: Subject, found: list[dict[int, MetricResult]]) -> Figure:
    layers = sorted(found[0])
    values_LC = np.array([[results[layer].value for results in found] for layer in layers])
    names, rows = [checkpoint.name for checkpoint in subject.checkpoints], [str(layer) for layer in layers]
    return Figure(
        "saturation-layers",
        "Saturation by layer",
        "Rows are layers, columns checkpoints. Layers that are dark early have settled first.",
        matrix("Saturation of all picks by layer and checkpoint", "layer", rows, names, values_LC),
        HeatMap(values_LC, "layer", "checkpoint", "saturation", rows, names, maximum=1.0),
    )


def _layer_figure(subject: Subject, layer: int, found: list[dict[int, MetricResult]]) -> Figure:
    x_C, title, log_x = _places(subject)
    results = [by_layer[layer] for by_layer in found]
    low_C = np.array([result.band.low if result.band else math.nan for result in results])
    high_C = np.array([result.band.high if result.band else math.nan for result in results])
    columns = [Column("checkpoint", text=True), Column("step", "d")]
    columns += [Column(name, ".4f") for name in ("saturation", "95 % from", "to", "corrected", "first choice")]
    rows = [
        [checkpoint.name, checkpoint.step, result.value, low, high, result.values["corrected"], result.values["rank_1"]]
        for checkpoint, result, low, high in zip(
            subject.checkpoints, results, low_C.tolist(), high_C.tolist(), strict=True
        )
    ]
    first_C = np.array([result.values["rank_1"] for result in results])
    chance = results[0].reference or 0.0
    return Figure(
        f"saturation-layer-{layer}",
        "Saturation of one layer",
        "As above, with the 95 % band over documents drawn anew.",
        Table("Saturation against the last state", columns, rows),
        Lines(
            [
                Series("all picks", x_C, np.array([result.value for result in results]), low_C, high_C),
                Series("first choice", x_C, first_C),
            ],
            title,
            "saturation",
            log_x=log_x,
            maximum=1.0,
            reference=(chance, f"chance {chance:.3g}"),
        ),
        layer=layer,
    )


def _change_figure(subject: Subject) -> Figure:
    """Early routing learning, and how balance came about."""
    x_C, title, log_x = _places(subject)
    rows, change_C = [], []
    for checkpoint in subject.checkpoints:
        counts = count(checkpoint.log, tables={"token"}, exclude=subject.counts.excluded)
        moved = [distribution_change(counts.layer(layer.layer), layer).value for layer in subject.layers]
        balance = [load_balance(layer) for layer in counts.layers.values()]
        change_C.append(float(np.nanmean(moved)))
        entropy = float(np.nanmean([result.values["entropy"] for result in balance]))
        worst = max(result.value for result in balance)
        rows.append([checkpoint.name, checkpoint.step, change_C[-1], entropy, worst])
    columns = [
        Column("checkpoint", text=True),
        Column("step", "d"),
        Column("distance of token ids", ".4f"),
        Column("entropy of the load", ".4f"),
        Column("largest MaxVio", ".3f"),
    ]
    return Figure(
        "routing-change",
        "Where token ids go, against the end",
        "Jensen-Shannon divergence between an id's distribution over experts now and in the end, in bits, mean over ids by "
        "their uses and over layers: 0 is the final distribution, 1 shares no expert with it. It falls early where routing by "
        "token id is learned early (OpenMoE's early routing learning). The table also has the balance of each checkpoint.",
        Table("Distance to the last state, and balance, by checkpoint", columns, rows),
        Lines([Series("distance", x_C, np.array(change_C))], title, "distance in bits", log_x=log_x),
    )
