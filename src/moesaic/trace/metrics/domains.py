"""Domain specialisation: which share of a domain's tokens goes to each expert."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from moesaic.trace.counts.routing import LayerCounts
from moesaic.trace.metrics.bootstrap import block_weights
from moesaic.trace.metrics.result import MetricResult, mean


def domain_specialisation(
    counts: LayerCounts,
    *,
    first: bool = False,
    names: Sequence[str] = (),
    min_count: int = 1,
    blocks: int = 64,
    replicates: int = 200,
) -> MetricResult:
    """D(e, d) = N_ed / N_d: of the tokens of domain d, the share that chose e (OLMoE, arXiv 2409.02060, eq. 7).

    The matrix has a row for each domain, which sums to K. The reference is the line of uniform routing, K / M. The table
    holds for each domain its tokens ("count"), its largest entry ("value"), where that is ("most"), and the ends of its
    band ("low", "high"). The value is the mean of the largest entries over domains.

    Args:
        counts: of the layer, with the tables "domain" and "block".
        first: first choices only; rows then sum to 1.
        names: of the domains by number, as in `TraceHeader.domains`.
        min_count: tokens of a domain at least.
        blocks: `RoutingCounts.blocks`.
        replicates: bootstrap draws for the bands.
    """
    table = counts.group("domain").at_least(min_count)
    matrix_GM = table.table_GM(first=first) / table.tokens_G.to(torch.float64).unsqueeze(-1)
    most = matrix_GM.max(-1)
    low_G, high_G = torch.full((2, len(table)), math.nan, dtype=torch.float64)
    block = counts.groups.get("block")
    for row, domain in enumerate(table.label_G.tolist()):
        if block is None:
            break
        mine = block[block.label_G // blocks == domain]
        weight_RB = block_weights(len(mine), replicates)
        if weight_RB is not None:
            chosen_B = mine.table_GM(first=first)[:, most.indices[row]].to(torch.float64)
            rate_R = (weight_RB @ chosen_B) / (weight_RB @ mine.tokens_G.to(torch.float64))
            low_G[row], high_G[row] = torch.quantile(rate_R, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return MetricResult(
        metric="domain_specialisation",
        layer=counts.layer,
        value=mean(most.values),
        top_k=1 if first else counts.top_k,
        num_columns=counts.num_columns,
        reference=(1 if first else counts.top_k) / counts.num_columns,
        table={
            "label": table.label_G,
            "count": table.tokens_G,
            "value": most.values,
            "most": most.indices,
            "low": low_G,
            "high": high_G,
        },
        names=tuple(names[int(domain)] for domain in table.label_G.tolist()) if names else (),
        matrix_GM=matrix_GM,
        min_count=min_count,
        conventions={"ranks": "first" if first else "all", "denominator": "tokens"},
    )
