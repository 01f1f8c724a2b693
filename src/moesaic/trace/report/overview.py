"""Overview: the tiles at the head of the page, and size and cost."""

from __future__ import annotations

from moesaic.trace.accounting import Accounting, short
from moesaic.trace.metrics import load_balance
from moesaic.trace.report.parts import Column, Figure, Section, Table, Tile
from moesaic.trace.report.subject import Subject


def tiles(subject: Subject) -> list[Tile]:
    """Numbers at the head of the page."""
    accounting, found = subject.accounting, []
    if accounting is not None:
        share = 100 * accounting.active / accounting.total
        found += [
            Tile(short(accounting.total), "parameters"),
            Tile(short(accounting.active), f"active for a token ({share:.0f} %)"),
            Tile(short(accounting.flops_per_token()), f"FLOPs for a token at {accounting.context_length:,} positions"),
        ]
    balance = [load_balance(layer, replicates=0) for layer in subject.layers]
    unused = sum(int(result.values["unused"]) for result in balance)
    worst = max(balance, key=lambda result: result.value)
    experts = sum(layer.num_experts for layer in subject.layers)
    found += [
        Tile(f"{len(subject.layers)} × {subject.num_experts:,}", "MoE layers × experts"),
        Tile(f"{subject.num_tokens:,}", f"tokens of {subject.num_documents:,} texts, padding left out"),
        Tile(f"{unused:,}", f"of {experts:,} experts never picked"),
        Tile(f"{worst.value:.2f}", f"largest MaxVio, in layer {worst.layer}"),
    ]
    picks = sum(int(layer.chosen_M[: layer.num_experts].sum()) for layer in subject.layers)
    dropped = sum(layer.dropped for layer in subject.layers)
    if any(layer.limited for layer in subject.layers):
        found.append(Tile(f"{100 * dropped / max(picks, 1):.1f} %", "of the picks dropped by a capacity"))
    return found


def section(subject: Subject) -> Section | None:
    """Size and cost of the model."""
    accounting = subject.accounting
    if accounting is None:
        return None
    how = (
        "All parameters must be stored; a token passes only through the active ones. Of the routed experts that is picks / "
        f"experts of each layer. FLOPs are 2 for each active matrix parameter plus attention over {accounting.context_length:,} "
        "positions, forward only."
    )
    plan = "Layers in a row that are alike share a line. Width is the hidden size of an expert; shared experts see every token."
    return Section(
        "size",
        "Size and cost",
        figures=[
            Figure("parameters", "Parameters by part", how, _parts(accounting)),
            Figure("layers", "Layer plan", plan, _layers(accounting)),
        ],
    )


def _parts(accounting: Accounting) -> Table:
    columns = [
        Column("part", text=True),
        Column("stored"),
        Column("share", ".1%"),
        Column("active for a token"),
        Column("share of the active", ".1%"),
    ]
    rows = [
        [name, part.total, part.total / accounting.total, part.active, part.active / accounting.active]
        for name, part in accounting.parts.items()
    ]
    return Table("Parameters by part", columns, [*rows, ["total", accounting.total, 1.0, accounting.active, 1.0]])


def _layers(accounting: Accounting) -> Table:
    texts, numbers = (
        ("layers", "kind", "router"),
        ("experts", "picks", "expert width", "shared width", "stored", "active"),
    )
    columns = [*(Column(name, text=True) for name in texts), *(Column(name) for name in numbers)]
    rows = [
        [
            layers,
            plan.kind,
            plan.router or "–",
            *(number or None for number in (plan.num_experts, plan.top_k, plan.expert_width, plan.shared_width)),
            plan.parameters.total,
            plan.parameters.active,
        ]
        for layers, plan in accounting.layer_groups()
    ]
    return Table("Layer plan; stored and active parameters of each layer", columns, rows)
