"""What each router says of itself: experts per token, nulls, drops, the part of a state, and its own readings."""

from __future__ import annotations

import numpy as np

from moesaic.trace.plots import HeatMap
from moesaic.trace.report.parts import Column, Figure, Section, Table, matrix
from moesaic.trace.report.subject import Subject


def section(subject: Subject) -> Section | None:
    """One line for each router; None without statistics."""
    statistics = subject.statistics
    if not statistics:
        return None
    columns = [
        Column("layer"),
        Column("router", text=True),
        Column("experts per token", ".2f"),
        Column("spread", ".2f"),
        Column("nulls", ".2%"),
        Column("dropped", ".2%"),
        Column("unserved", ".2%"),
        Column("by state", ".2%"),
        Column("readings", text=True),
    ]
    rows = [
        [
            row.layer,
            row.router,
            row.experts_mean,
            row.experts_std,
            row.null_share,
            row.drop_rate,
            row.unserved,
            row.state_influence,
            ", ".join(f"{name} {value:.3g}" for name, value in row.readings.items()) or "–",
        ]
        for row in statistics
    ]
    figures = [
        Figure(
            "routers",
            "Routers by layer",
            "Experts per token: mean and standard deviation over tokens; a spread of 0 means that every token runs as many. "
            "Nulls: share of the selections that were null experts. Dropped: share of the picks that found their expert "
            "full. Unserved: tokens that no expert computed. By state: share of the picks that would be others if the router "
            "had not seen the state of the layers below.",
            Table("Routers by layer", columns, rows),
        )
    ]
    varied = [row for row in statistics if row.experts_std and row.by_frequency]
    if varied:
        values_LB = np.array([[bucket.experts for bucket in row.by_frequency] for row in varied])
        layers = [str(row.layer) for row in varied]
        names = [str(bucket.least) for bucket in varied[0].by_frequency]
        figures.append(
            Figure(
                "experts-by-frequency",
                "Experts per token by frequency",
                "The tokens of the text, rare ones left and frequent ones right, in groups with about as many occurrences "
                "each; each cell is the mean number of experts that such a token ran.",
                matrix(
                    "Experts that a token ran, by how often it occurs in the text", "layer", layers, names, values_LB
                ),
                HeatMap(values_LB, "layer", "occurrences of the token, from", "experts per token", layers, names),
            )
        )
    return Section("routers", "Routers", figures=figures)
