"""Tokens of each expert."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.trace.counts.routing import LayerCounts
from moesaic.trace.metrics import TokenShare, token_clusters
from moesaic.trace.report.parts import Chip, Column, Figure, Section, Table
from moesaic.trace.report.subject import Subject


def section(subject: Subject) -> Section:
    """Specific and frequent tokens of every expert, one layer at a time."""
    notes = list(subject.detail_note)
    if not subject.has_tokens:
        notes = ["The model was run on embeddings, so there are no token ids to show."]
    figures = [_figure(subject, layer) for layer in subject.detailed] if subject.has_tokens else []
    return Section("tokens", "Tokens of each expert", figures=figures, notes=notes)


def _figure(subject: Subject, layer: LayerCounts) -> Figure:
    specific = token_clusters(layer, by="lift", top=subject.top, minimum=subject.minimum)
    frequent = token_clusters(layer, by="count", top=subject.top)
    load = layer.chosen_M.tolist()
    total = max(sum(load), 1)
    rows = [
        [
            expert,
            load[expert] / total,
            _chips(subject, specific[expert], True),
            _chips(subject, frequent[expert], False),
        ]
        for expert in range(layer.num_experts)
    ]
    columns = [
        Column("expert"),
        Column("share of picks", ".2%"),
        Column("specific", text=True),
        Column("frequent", text=True),
    ]
    return Figure(
        f"tokens-layer-{layer.layer}",
        "Specific and frequent tokens",
        "Specific: tokens that come to this expert more often than chance, with the factor (×3.0: three times as often as "
        f"among all tokens; at least {subject.minimum} picks). Frequent: tokens that it sees most, with the count. ␣ is a "
        "blank, ⏎ a line end, ⇥ a tab.",
        Table("Tokens of each expert", columns, rows),
        layer=layer.layer,
    )


def _chips(subject: Subject, tokens: Sequence[TokenShare], lift: bool) -> tuple[Chip, ...]:
    return tuple(
        Chip(
            subject.names.visible(item.token_id),
            f"×{item.lift:.1f}" if lift else f"{item.count}",
            f"token {item.token_id}: {item.count} picks, lift {item.lift:.2f}",
        )
        for item in tokens
    )
