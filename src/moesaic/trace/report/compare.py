"""Two models, or two traces, on the same text."""

from __future__ import annotations

import numpy as np
import torch

from moesaic.trace.counts.count import count
from moesaic.trace.counts.routing import LayerCounts, RoutingCounts
from moesaic.trace.header import TraceHeader
from moesaic.trace.metrics import (
    ExpertMatch,
    group_information,
    load_balance,
    match_experts,
    relative_load,
    renumbered,
    router_saturation,
)
from moesaic.trace.plots import HeatMap, Lines, Series
from moesaic.trace.report.parts import Column, Figure, Section, Table, matrix
from moesaic.trace.report.subject import Named, Subject


def section(subject: Subject) -> Section | None:
    """Balance side by side, and, where both have the same layers, agreement and load differences."""
    other = subject.other
    if other is None:
        return None
    theirs = count(other.log, tables={"token"}, exclude=subject.counts.excluded)
    figures = [_balance_figure(subject, other, theirs)]
    notes = []
    if _same_shape(subject.log.header, other.log.header):
        matches = {
            layer.layer: match_experts(theirs.layer(layer.layer), layer)
            for layer in subject.layers
            if subject.has_tokens
        }
        figures += [_agreement_figure(subject, other, matches), _difference_figure(subject, other, theirs, matches)]
        shown = {layer.layer for layer in subject.detailed}
        figures += [_match_figure(other, layer, match) for layer, match in matches.items() if layer in shown]
    else:
        notes.append(
            "The models have other layers or other numbers of experts, so picks can't be compared one by one: only balance "
            "and what explains the routing are."
        )
    return Section(
        "compare",
        f"Compared with {other.name}",
        f"The same text, routed by {subject.title} and by {other.name}.",
        figures,
        notes,
    )


def _same_shape(one: TraceHeader, other: TraceHeader) -> bool:
    shapes = [
        {index: (facts.num_experts, facts.num_null) for index, facts in header.layers.items()}
        for header in (one, other)
    ]
    return shapes[0] == shapes[1]


def _balance_figure(subject: Subject, other: Named, theirs: RoutingCounts) -> Figure:
    sides = {subject.title: subject.layers, other.name: [counts for _, counts in sorted(theirs.layers.items())]}
    series, rows = [], []
    for name, layers in sides.items():
        results = [load_balance(layer) for layer in layers]
        known = [group_information(layer) if subject.has_tokens else None for layer in layers]
        at_L = np.array([layer.layer for layer in layers], dtype=float)
        series.append(Series(f"entropy, {name}", at_L, np.array([result.values["entropy"] for result in results])))
        if subject.has_tokens:
            explained_L = np.array([result.value for result in known if result is not None])
            series.append(Series(f"explained by token id, {name}", at_L, explained_L))
        rows += [
            [
                name,
                layer.layer,
                result.values["entropy"],
                result.value,
                result.values["gini"],
                int(result.values["unused"]),
                None if information is None else information.value,
            ]
            for layer, result, information in zip(layers, results, known, strict=True)
        ]
    columns = [Column("model", text=True), Column("layer")]
    columns += [Column(name, ".4f") for name in ("entropy", "MaxVio", "Gini")]
    columns += [Column("experts never picked"), Column("explained by token id", ".4f")]
    return Figure(
        "compare-balance",
        "Balance and specialisation side by side",
        "Entropy of the load: 1 is balanced. Explained by token id: share of the entropy of the routing that goes away once "
        "the token id is known.",
        Table("Balance and specialisation of both", columns, rows),
        Lines(series, "layer", "share", maximum=1.0),
    )


def _agreement_figure(subject: Subject, other: Named, matches: dict[int, ExpertMatch]) -> Figure:
    plain = router_saturation(other.log, subject.log)
    matched = plain
    if matches:
        new = {layer: match.expert_N for layer, match in matches.items()}
        matched = router_saturation(renumbered(other.log, new), subject.log)
    layers = sorted(plain)
    at_L = np.array(layers, dtype=float)
    series = [
        Series("experts matched", at_L, np.array([matched[layer].value for layer in layers])),
        Series("as numbered", at_L, np.array([plain[layer].value for layer in layers])),
    ]
    chance = float(np.mean([plain[layer].reference or 0.0 for layer in layers]))
    heads = ("as numbered", "matched", "95 % from", "to", "chance", "first choice as numbered", "first choice matched")
    rows = [
        [
            layer,
            plain[layer].value,
            matched[layer].value,
            *(_ends(matched[layer])),
            plain[layer].reference,
            plain[layer].values["rank_1"],
            matched[layer].values["rank_1"],
        ]
        for layer in layers
    ]
    return Figure(
        "compare-agreement",
        "Agreement of the picks",
        "Share of a token's picks that both make. As numbered: expert 3 is expert 3; right for two states of one run. Matched: "
        "experts are paired so that they stand for the same token ids as far as can be; right for runs that never shared "
        "experts. Pairing helps a little even where there is nothing to find.",
        Table("Share of the picks that both make", [Column("layer"), *(Column(name, ".4f") for name in heads)], rows),
        Lines(series, "layer", "agreement", maximum=1.0, reference=(chance, f"chance {chance:.3g}")),
    )


def _ends(result) -> tuple[float | None, float | None]:
    return (None, None) if result.band is None else (result.band.low, result.band.high)


def _difference_figure(
    subject: Subject, other: Named, theirs: RoutingCounts, matches: dict[int, ExpertMatch]
) -> Figure:
    values_LN = np.full((len(subject.layers), subject.num_experts), np.nan)
    for row, layer in enumerate(subject.layers):
        mine_N, theirs_N = _loads(layer), _loads(theirs.layer(layer.layer))
        if layer.layer in matches:
            moved_N = torch.zeros_like(theirs_N)
            moved_N[matches[layer.layer].expert_N] = theirs_N
            theirs_N = moved_N
        ratio_N = (mine_N / theirs_N).masked_fill(theirs_N == 0, torch.nan)
        values_LN[row, : layer.num_experts] = ratio_N.numpy()
    names = [str(layer.layer) for layer in subject.layers]
    experts = [str(expert) for expert in range(subject.num_experts)]
    return Figure(
        "compare-load",
        "Load against the other's",
        f"Load of each expert over that of its partner in {other.name}: pale is equal, orange is busier here, blue is busier "
        "there.",
        matrix("Relative load over the partner's", "layer", names, experts, values_LN),
        HeatMap(values_LN, "layer", "expert", "load here / load there", names, experts, scale="ratio"),
    )


def _loads(layer: LayerCounts) -> torch.Tensor:
    return relative_load(layer.chosen_M[: layer.num_experts])


def _match_figure(other: Named, layer: int, match: ExpertMatch) -> Figure:
    partners = match.expert_N.argsort().tolist()
    alike = match.similarity_N[match.expert_N.argsort()].tolist()
    return Figure(
        f"compare-experts-layer-{layer}",
        "Partners",
        "The expert of the other model that goes with each expert, and the cosine of what they are chosen for: 1 is the same "
        "token ids in the same shares.",
        Table(
            f"Experts and their partners in {other.name}",
            [Column("expert"), Column("partner"), Column("similarity", ".3f")],
            [[expert, partner, value] for expert, (partner, value) in enumerate(zip(partners, alike, strict=True))],
        ),
        layer=layer,
    )
