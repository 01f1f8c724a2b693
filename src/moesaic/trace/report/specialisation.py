"""What experts are chosen for: token ids, positions, domains."""

from __future__ import annotations

import math

import numpy as np

from moesaic.trace.counts.routing import LayerCounts
from moesaic.trace.metrics import (
    MetricResult,
    domain_specialisation,
    group_distribution,
    group_information,
    routing_deviation,
    vocabulary_specialisation,
)
from moesaic.trace.plots import Lines, Panels, Radar, Series
from moesaic.trace.report.parts import Column, Figure, Section, Table
from moesaic.trace.report.subject import Subject

RADAR_EXPERTS = 64
SHOWN_EXPERTS = 64
SHOWN_IDS = 1_000


def section(subject: Subject) -> Section:
    """Deviation, information and vocabulary over layers; ids, positions and domains of single layers."""
    groups = ["token", "position", *(["domain"] if subject.has_domains else [])]
    if not subject.has_tokens:
        groups.remove("token")
    deviations = {name: [_deviation(subject, layer, name) for layer in subject.layers] for name in groups}
    information = {name: [group_information(layer, name) for layer in subject.layers] for name in groups}
    figures = [_deviation_figure(subject, deviations), _information_figure(subject, information)]
    if subject.has_tokens:
        figures.append(_vocabulary_figure(subject))
    order = {layer.layer: index for index, layer in enumerate(subject.layers)}
    for layer in subject.detailed:
        index = order[layer.layer]
        if subject.has_tokens and deviations["token"][index].values["groups"]:
            figures.append(_ids_figure(subject, layer, deviations["token"][index]))
        figures.append(_positions_figure(layer, deviations["position"][index]))
        if subject.has_domains:
            figures += _domain_figures(subject, layer)
    intro = (
        "Does an expert stand for words, for places in the text, or for kinds of text? Each answer comes with what chance "
        "would give."
    )
    notes = [
        f"Token ids with fewer than {subject.min_uses} uses are left out of deviations: few uses look specialised by chance."
    ]
    return Section("specialisation", "Specialisation", intro, figures, notes + subject.detail_note)


def _deviation(subject: Subject, layer: LayerCounts, group: str) -> MetricResult:
    return routing_deviation(layer, group, min_count=subject.min_uses if group == "token" else 1)


def _deviation_figure(subject: Subject, results: dict[str, list[MetricResult]]) -> Figure:
    layers_L = np.array([layer.layer for layer in subject.layers], dtype=float)
    series, columns = [], [Column("layer")]
    for name, found in results.items():
        series.append(Series(f"s of {_plural(name)}", layers_L, np.array([result.value for result in found])))
        columns += [Column(f"{name} {part}", ".4f") for part in ("s", "floor", "s_rel", "excess")]
        columns.append(Column(f"{_plural(name)}"))
    for name, found in results.items():
        if name != "domain":
            floor_L = np.array([result.reference or math.nan for result in found])
            series.append(Series(f"noise floor of {_plural(name)}", layers_L, floor_L))
    rows = [
        [
            layer.layer,
            *(cell for found in results.values() for cell in _deviation_cells(found[index])),
        ]
        for index, layer in enumerate(subject.layers)
    ]
    return Figure(
        "deviation",
        "Routing deviation by layer",
        "s is the standard deviation of a group's shares over the experts: 0 where the group goes everywhere alike, "
        "largest where it always goes to the same experts. The noise floor is what chance gives with so few tokens. Token ids "
        "far above their floor and positions near theirs mean that experts stand for words, whatever stands around them "
        "(OpenMoE's context-independent specialisation). s_rel measures the distance to the average load instead of to even "
        "use, excess is what s has above its floor.",
        Table("Routing deviation s by layer, with its noise floor", columns, rows),
        Lines(_known(series), "layer", "mean s"),
    )


def _deviation_cells(result: MetricResult) -> list[float | int | None]:
    values = result.values
    return [result.value, result.reference, values["relative"], values["excess"], int(values["groups"])]


def _information_figure(subject: Subject, results: dict[str, list[MetricResult]]) -> Figure:
    layers_L = np.array([layer.layer for layer in subject.layers], dtype=float)
    series = [
        Series(_plural(name), layers_L, np.array([result.value for result in found])) for name, found in results.items()
    ]
    series += [
        Series(f"{_plural(name)}, shuffled", layers_L, np.array([result.reference or math.nan for result in found]))
        for name, found in results.items()
        if name != "domain"
    ]
    columns = [Column("layer")]
    columns += [Column(f"{name}{part}", ".4f") for name in results for part in ("", ", shuffled")]
    rows = [
        [layer.layer, *(cell for found in results.values() for cell in (found[index].value, found[index].reference))]
        for index, layer in enumerate(subject.layers)
    ]
    return Figure(
        "information",
        "What explains the routing",
        "Share of the entropy of the routing that goes away once the token id, the position or the domain is known: 0 "
        "nothing, 1 all. Shuffled is the same with labels dealt at random: it is above 0 for small groups and must be "
        "taken off.",
        Table("Normalised mutual information by layer", columns, rows),
        Lines(_known(series), "layer", "explained share", maximum=1.0 if _largest(series) > 0.5 else None),
    )


def _vocabulary_figure(subject: Subject) -> Figure:
    found = [
        (
            vocabulary_specialisation(layer, min_count=subject.minimum),
            _next(layer, subject.minimum),
        )
        for layer in subject.layers
    ]
    layers_L = np.array([layer.layer for layer in subject.layers], dtype=float)
    series = [
        Series("token itself", layers_L, np.array([own.value for own, _ in found])),
        Series("next token", layers_L, np.array([after for _, after in found])),
        Series("random routing", layers_L, np.array([own.reference or math.nan for own, _ in found])),
    ]
    columns = [
        Column("layer"),
        *(Column(item.name, ".4f") for item in series),
        Column("by occurrences", ".4f"),
        Column("ids"),
    ]
    rows = [
        [layer.layer, own.value, after, own.reference, own.values["by_occurrences"], int(own.values["ids"])]
        for layer, (own, after) in zip(subject.layers, found, strict=True)
    ]
    return Figure(
        "vocabulary",
        "Vocabulary specialisation by layer",
        "For each token id the share of its uses whose first choice is the id's most frequent expert; the mean over ids with "
        f"at least {subject.minimum} uses. 1: each id has one expert. In layers where the line of the next token rises above "
        "that of the token itself, routing follows what the model is about to say. Random routing with the same load and as "
        "many uses gives the lowest line.",
        Table("Vocabulary specialisation of the first choice by layer", columns, rows),
        Lines(_known(series), "layer", "share of the uses", maximum=1.0),
    )


def _next(layer: LayerCounts, minimum: int) -> float:
    """NaN where no token has a next one."""
    if "next" not in layer.groups:
        return math.nan
    return vocabulary_specialisation(layer, ids="next", min_count=minimum, chance=False).value


def _ids_figure(subject: Subject, layer: LayerCounts, result: MetricResult) -> Figure:
    rows = sorted(result.rows(), key=lambda row: -(row["value"] or 0.0))
    rank_G = np.arange(1, len(rows) + 1, dtype=float)
    columns = [
        Column("token", text=True),
        Column("id", "d"),
        Column("uses"),
        *(Column(name, ".4f") for name in ("s", "floor", "s_rel")),
    ]
    cells = [
        [subject.names.visible(row["label"]), row["label"], row["count"], row["value"], row["floor"], row["relative"]]
        for row in rows[:SHOWN_IDS]
    ]
    return Figure(
        f"token-deviation-layer-{layer.layer}",
        "Token ids, from the most to the least specialised",
        f"Each of the {len(rows):,} ids with at least {subject.min_uses} uses, sorted by s; its own noise floor below. The line "
        "at the top is the largest possible s: the id always goes to the same experts.",
        Table(f"Routing deviation of token ids{_most(len(rows))}", columns, cells),
        Lines(
            [
                Series("s", rank_G, np.array([row["value"] or math.nan for row in rows])),
                Series("noise floor", rank_G, np.array([row["floor"] or math.nan for row in rows])),
                Series("s_rel", rank_G, np.array([row["relative"] or math.nan for row in rows])),
            ],
            "rank of the token id",
            "s",
            reference=(result.values["bound"], "largest possible"),
        ),
        layer=layer.layer,
    )


def _positions_figure(layer: LayerCounts, result: MetricResult) -> Figure:
    rows = result.rows()
    at_G = np.array([row["label"] for row in rows], dtype=float)
    columns = [Column("position, from"), Column("tokens"), *(Column(name, ".4f") for name in ("s", "floor", "s_rel"))]
    names = ("label", "count", "value", "floor", "relative")
    return Figure(
        f"position-deviation-layer-{layer.layer}",
        "Positions in the document",
        "s of the tokens at each position beside its noise floor, which rises where few documents are so long, and s_rel, "
        "which leaves out what is only uneven load. The first positions often stand out, since they hold the same tokens "
        "everywhere; a line on the floor means that position decides nothing. Grey: the tokens that a value rests on.",
        Table("Routing deviation by position", columns, [[row[name] for name in names] for row in rows[:SHOWN_IDS]]),
        Lines(
            [
                Series("s", at_G, np.array([row["value"] or math.nan for row in rows])),
                Series("noise floor", at_G, np.array([row["floor"] or math.nan for row in rows])),
                Series("s_rel", at_G, np.array([row["relative"] or math.nan for row in rows])),
            ],
            "position in the document",
            "s",
            behind=Series("tokens", at_G, np.array([row["count"] for row in rows], dtype=float)),
        ),
        layer=layer.layer,
    )


def _domain_figures(subject: Subject, layer: LayerCounts) -> list[Figure]:
    result = domain_specialisation(layer, names=subject.log.header.domains, blocks=subject.counts.blocks)
    assert result.matrix_GM is not None, "domains have one"
    share_GM = result.matrix_GM.numpy()
    shown = sorted(np.argsort(-share_GM.max(axis=0), kind="stable")[:SHOWN_EXPERTS].tolist())
    names = [str(column) if column < layer.num_experts else f"null {column}" for column in shown]
    cut = (
        f" The {len(shown)} experts with the highest bars of {layer.num_columns:,} are shown."
        if len(shown) < layer.num_columns
        else ""
    )
    groups = {name or "(none)": share_GM[row, shown] for row, name in enumerate(result.names)}
    line = (result.reference or 0.0, f"even: K / E = {result.reference:.3g}")
    columns = [Column("expert", "d"), *(Column(name, ".4f") for name in groups)]
    table = Table(
        "Share of the domain's tokens that chose the expert",
        columns,
        [[column, *share_GM[:, column].tolist()] for column in range(layer.num_columns)],
    )
    figures = [
        Figure(
            f"domains-layer-{layer.layer}",
            "Experts by domain",
            "Of the tokens of a domain, the share that chose each expert; the bars of a domain sum to K. The line is even "
            f"use. An expert that is high in one panel and low in another has specialised.{cut}",
            table,
            Panels(groups, "expert", "share of the domain's tokens", names, reference=line),
            layer=layer.layer,
        )
    ]
    if layer.num_columns <= RADAR_EXPERTS and 1 < len(groups) <= 8:
        shares = group_distribution(layer, "domain").matrix_GM
        assert shares is not None, "distributions have one"
        figures.append(
            Figure(
                f"domain-radar-layer-{layer.layer}",
                "Domains around the circle of experts",
                "Share of a domain's selections that each expert gets, one curve for each domain. Curves on top of each "
                "other: the domains route alike. The dashed circle is even use.",
                Table(
                    "Share of the domain's selections",
                    columns,
                    [[column, *shares[:, column].tolist()] for column in range(layer.num_columns)],
                ),
                Radar(
                    {name: shares[row].numpy() for row, name in enumerate(groups)},
                    [str(column) for column in range(layer.num_columns)],
                    "share of the selections",
                    reference=(1 / layer.num_columns, "even"),
                ),
                layer=layer.layer,
            )
        )
    return figures


def _plural(group: str) -> str:
    return "token ids" if group == "token" else f"{group}s"


def _most(count: int) -> str:
    return f", the first {SHOWN_IDS:,}" if count > SHOWN_IDS else ""


def _known(series: list[Series]) -> list[Series]:
    """Without those that have no value anywhere."""
    return [item for item in series if np.isfinite(item.y_P).any()]


def _largest(series: list[Series]) -> float:
    return max((float(np.nanmax(item.y_P, initial=0.0)) for item in series), default=0.0)
