"""Which picks a capacity drops: by place in the sequence, position in the document, turn and domain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.trace.counts.routing import LayerCounts
from moesaic.trace.metrics.bootstrap import band_of, block_weights
from moesaic.trace.metrics.result import MetricResult

FEW = 30
"""Below so many sequences a rate is flagged."""


def drop_rate(chosen_M: Tensor, num_experts: int, dropped: int) -> float:
    """Share of the picks of experts that a capacity dropped; picks of null experts can't be. 0 without a pick."""
    return dropped / max(int(chosen_M[:num_experts].sum()), 1)


def drop_rate_by_position(picks_P: Tensor, dropped_P: Tensor, *, parts: int | None = None) -> Tensor:
    """Share of the picks at each position that were dropped, float64; NaN where nothing was picked.

    Drop towards the end in OpenMoE (arXiv 2402.01739, figure 12): position p counts the sequences that
    are longer than p, so the last entries rest on few.

    Args:
        picks_P: picks by bucket of positions, as in `PositionCounts`.
        dropped_P: dropped picks by bucket.
        parts: sum up this many equal stretches of the positions instead, 4 for quarters. The length P need not be a
            multiple; with fewer buckets than parts some stay empty.
    """
    if parts is not None:
        part_P = torch.arange(len(picks_P)) * parts // max(len(picks_P), 1)
        picks_P, dropped_P = (
            torch.zeros(parts, dtype=torch.int64).index_add(0, part_P, counts_P.to(torch.int64))
            for counts_P in (picks_P, dropped_P)
        )
    return dropped_P.to(torch.float64) / picks_P.to(torch.float64)


def drop_rates(
    counts: LayerCounts,
    *,
    by: Literal["place", "position", "turn", "domain"] = "place",
    per_domain: bool = True,
    parts: int | None = None,
    replicates: int = 200,
    names: Sequence[str] = (),
) -> MetricResult:
    """Share of the picks of experts that were dropped, with what it rests on (OpenMoE, arXiv 2402.01739, figure 12).

    drop(p) = dropped picks of tokens at p / picks of experts of tokens at p: per assignment, so with K picks each that
    is over K n(p), n(p) the number of sequences longer than p. The table holds for each domain and place n(p)
    ("count"), "tokens", "picks", "dropped", the rate ("value"), the share of tokens that no expert computed
    ("unserved", the rate of expert choice), 1 where n(p) is below 30 ("few"), and the ends of the band ("low", "high").
    The value is the rate over everything. Without a capacity all rates are 0.

    Args:
        counts: with the table "drops".
        by: "place" in the row of the batch, what a capacity fills by; "position" in the document, which differs where
            documents are packed; "turn" of the conversation; "domain" alone.
        per_domain: a line for each domain, instead of one for all.
        parts: so many equal stretches of the longest sequence instead of single places, 4 for quarters.
        replicates: bootstrap draws for the bands, over blocks of documents.
        names: of the domains by number, as in `TraceHeader.domains`.

    Raises:
        ConfigError: if drops, or turns, were not counted, or `parts` is below 1.
    """
    table = "place" if by == "domain" else by
    if table not in counts.drops:
        known = ", ".join(counts.drops) or "none"
        raise ConfigError("by", by, f"was not counted in layer {counts.layer}", f"counted are: {known}")
    if parts is not None and parts < 1:
        raise ConfigError("parts", parts, "is below 1", "choose 1 or more")
    drops = counts.drops[table]
    keys = (*(("label",) if by != "domain" else ()), *(("domain",) if per_domain or by == "domain" else ()))
    rows, blocks = drops.by(*keys, parts=parts), drops.by(*keys, "block", parts=parts)
    row_key = _key(rows.label_G, rows.domain_G, drops.domain_G)
    row_S = torch.searchsorted(row_key, _key(blocks.label_G, blocks.domain_G, drops.domain_G))
    width = int(drops.block_G.max()) + 1
    picks_GB, dropped_GB = torch.zeros(2, len(rows), width, dtype=torch.float64)
    picks_GB[row_S, blocks.block_G], dropped_GB[row_S, blocks.block_G] = (
        blocks.picks_G.double(),
        blocks.dropped_G.double(),
    )
    low_G, high_G = torch.full((2, len(rows)), math.nan, dtype=torch.float64)
    for domain in rows.domain_G.unique().tolist():
        inside_G = rows.domain_G == domain
        rates_GR = _draws(picks_GB[inside_G], dropped_GB[inside_G], replicates)
        if rates_GR is not None:
            ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
            low_G[inside_G], high_G[inside_G] = torch.nanquantile(rates_GR, ends, dim=-1)
    whole_R = _draws(picks_GB.sum(0, keepdim=True), dropped_GB.sum(0, keepdim=True), replicates)
    labelled = by == "domain" and len(names) > 0
    return MetricResult(
        metric=f"drop_rate_by_{by}",
        layer=counts.layer,
        value=float(rows.dropped_G.sum()) / (float(rows.picks_G.sum()) or math.nan),
        top_k=counts.top_k,
        num_columns=counts.num_columns,
        reference=0.0,
        values={"unserved": counts.unserved / (counts.tokens or math.nan)},
        table={
            "label": rows.domain_G if by == "domain" else rows.label_G,
            "domain": rows.domain_G,
            "count": rows.sequences_G,
            "tokens": rows.tokens_G,
            "picks": rows.picks_G,
            "dropped": rows.dropped_G,
            "value": rows.dropped_G.double() / rows.picks_G.double(),
            "unserved": rows.unserved_G.double() / rows.tokens_G.double(),
            "few": (rows.sequences_G < FEW).long(),
            "low": low_G,
            "high": high_G,
        },
        names=tuple(names[int(domain)] for domain in rows.domain_G.tolist()) if labelled else (),
        band=None if whole_R is None else band_of(whole_R[0]),
        conventions={
            "denominator": "picks of experts",
            "limited": counts.limited,
            "width": 0 if by in ("domain", "turn") else drops.width,
            "parts": parts or 0,
            "per_domain": per_domain,
            "few": FEW,
        },
    )


def _key(label_G: Tensor, domain_G: Tensor, all_domains: Tensor) -> Tensor:
    return label_G * (int(all_domains.max()) + 1) + domain_G


def _draws(picks_GB: Tensor, dropped_GB: Tensor, replicates: int) -> Tensor | None:
    """Rates of each row in each replicate, (G, R); None for fewer than two blocks."""
    used_B = picks_GB.sum(0) > 0
    weight_RB = block_weights(int(used_B.sum()), replicates)
    if weight_RB is None:
        return None
    return (dropped_GB[:, used_B] @ weight_RB.T) / (picks_GB[:, used_B] @ weight_RB.T)
