"""Which experts are picked together."""

from __future__ import annotations

import math

import numpy as np

from moesaic.trace.counts.routing import LayerCounts
from moesaic.trace.metrics import coactivation_table
from moesaic.trace.plots import HeatMap
from moesaic.trace.report.parts import Column, Figure, Section, Table, matrix
from moesaic.trace.report.subject import Subject

EXPERTS_SHOWN = 64
PAIRS_SHOWN = 60


def section(subject: Subject) -> Section | None:
    """Strongest pairs and matrix of the layers in detail; None if no token has two experts."""
    layers = [layer for layer in subject.detailed if layer.top_k > 1]
    if not layers:
        return None
    figures = [figure for layer in layers for figure in _figures(subject, layer)]
    intro = "Of the tokens that picked one expert, how many also picked another."
    return Section("coactivation", "Experts picked together", intro, figures, subject.detail_note)


def _figures(subject: Subject, layer: LayerCounts) -> list[Figure]:
    result = coactivation_table(subject.pairs.layer(layer.layer))
    assert result.matrix_GM is not None, "it is one"
    share_MM, independent = result.matrix_GM.numpy(), result.reference or 0.0
    chosen_M = result.table["count"].numpy()
    enough_M = chosen_M >= subject.min_uses
    if not enough_M.any():
        enough_M = chosen_M > 0
    pairs = _strongest_pairs(np.where(enough_M[:, None], share_MM, np.nan))
    shown = _shown(pairs, chosen_M)
    pairs = pairs[:PAIRS_SHOWN]
    names = [str(expert) if expert < layer.num_experts else f"null {expert}" for expert in shown]
    part_MM = share_MM[np.ix_(shown, shown)]
    cut = ""
    if len(shown) < layer.num_columns:
        cut = f" The {len(shown)} experts with the strongest pairs of {layer.num_columns:,} are shown."
    sums_M = result.table["row_sum"].numpy()
    sums_M = sums_M[~np.isnan(sums_M)]
    check = f"{sums_M.min():.3f} to {sums_M.max():.3f}" if len(sums_M) else "nothing"
    return [
        Figure(
            f"coactivation-layer-{layer.layer}",
            "Co-activation",
            "Row i, column j: of the tokens that picked expert i, the share that also picked expert j. Even, independent "
            f"picks would give {independent:.2%} everywhere. A dark column is a popular expert; a dark cell on both sides "
            f"of the diagonal is a pair that works together. All cells of a row, shown or not, sum to the picks beside "
            f"one, K - 1 where every token has K: here {check}.{cut}",
            matrix("Co-activation: share of the row expert's tokens", "expert", names, names, part_MM),
            HeatMap(
                part_MM,
                "of the tokens of expert",
                "this share also picked expert",
                "share of the tokens",
                names,
                names,
                width=640.0,
            ),
            layer=layer.layer,
        ),
        Figure(
            f"pairs-layer-{layer.layer}",
            "Strongest pairs",
            f"Pairs of experts, strongest first, of experts with at least {subject.min_uses} tokens where there are any. Lift: "
            "the share over that of even, independent picks.",
            Table(
                "Strongest pairs of experts",
                [
                    Column("of the tokens of"),
                    Column("also picked"),
                    Column("tokens"),
                    Column("share", ".1%"),
                    Column("lift", ".2f"),
                ],
                [
                    [i, j, int(chosen_M[i]), float(share_MM[i, j]), float(share_MM[i, j]) / (independent or math.nan)]
                    for i, j in pairs
                ],
            ),
            layer=layer.layer,
        ),
    ]


def _strongest_pairs(share_MM: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of experts, strongest first; more than are shown, for the choice of experts."""
    order = np.argsort(-np.nan_to_num(share_MM), axis=None, kind="stable")[: 4 * EXPERTS_SHOWN]
    return [
        (int(i), int(j)) for i, j in zip(*np.unravel_index(order, share_MM.shape), strict=True) if share_MM[i, j] > 0
    ]


def _shown(pairs: list[tuple[int, int]], chosen_M: np.ndarray) -> list[int]:
    """Experts of the strongest pairs, then the most used ones, in the order of their numbers."""
    ranked = [*(expert for pair in pairs for expert in pair), *np.argsort(-chosen_M, kind="stable").tolist()]
    return sorted(list(dict.fromkeys(ranked))[:EXPERTS_SHOWN])
