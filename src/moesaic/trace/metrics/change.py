"""Early routing learning: how the distribution of a token id over experts moves between checkpoints."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.trace.counts.routing import LayerCounts
from moesaic.trace.metrics.deviation import shares
from moesaic.trace.metrics.result import MetricResult, mean


def distribution_change(
    counts: LayerCounts,
    final: LayerCounts,
    group: str = "token",
    *,
    labels: Collection[int] | None = None,
    measure: Literal["jensen_shannon", "cosine"] = "jensen_shannon",
    first: bool = False,
    min_count: int = 1,
) -> MetricResult:
    """Distance of each group's distribution over experts from that of another checkpoint (OpenMoE, figure 11).

    With f and f' the distributions of a group (sum 1), the Jensen-Shannon divergence is
    H((f + f') / 2) - (H(f) + H(f')) / 2 in bits: 0 where they are equal, 1 where they share no expert. The cosine is
    f f' / (|f| |f'|): 1 and 0. The value is the mean of `measure` over groups, weighted by their tokens in `final`. The
    table holds "count" (tokens in `final`), "jensen_shannon" and "cosine", of which "value" is a copy. `values`: the
    weighted means of both, and their plain means ("..._by_group").

    Args:
        counts: of one checkpoint.
        final: of the other; both of the same text.
        group: the grouping.
        labels: only these groups, for example the ids of "ed" and "an"; None for all.
        measure: which one is the value.
        first: first choices only.
        min_count: leave out groups with fewer tokens in either.

    Raises:
        ConfigError: if the layers have different numbers of experts, or share no group.
    """
    if measure not in ("jensen_shannon", "cosine"):
        raise ConfigError("measure", measure, "is not one of the choices", "choose 'jensen_shannon' or 'cosine'")
    if counts.num_columns != final.num_columns:
        raise ConfigError(
            "final", final.num_columns, f"is not the other's number of columns ({counts.num_columns})", "match models"
        )
    tables = [side.group(group).at_least(min_count) for side in (counts, final)]
    common = np.intersect1d(tables[0].label_G.numpy(), tables[1].label_G.numpy())
    if labels is not None:
        common = np.intersect1d(common, np.array(sorted(labels), dtype=np.int64))
    if not len(common):
        raise ConfigError("group", group, "has no group in both checkpoints", "count the same text, or lower min_count")
    tables = [table[torch.isin(table.label_G, torch.from_numpy(common))] for table in tables]
    # All of the pairs that occur in either, in one order.
    keys, values = [], []
    for table in tables:
        share_P, _ = shares(table, first=first)
        keys.append(table.group_P.numpy().astype(np.int64) * table.num_columns + table.column_P.numpy())
        values.append(share_P.numpy())
    union_P = np.union1d(*keys)
    both_2P = np.zeros((2, len(union_P)))
    for side, (key_P, share_P) in enumerate(zip(keys, values, strict=True)):
        both_2P[side, np.searchsorted(union_P, key_P)] = share_P
    group_P = torch.from_numpy(union_P // tables[0].num_columns)
    one_P, other_P = torch.from_numpy(both_2P)

    def total(values_P: Tensor) -> Tensor:
        return torch.zeros(len(common), dtype=torch.float64).index_add(0, group_P, values_P)

    entr = torch.special.entr
    divergence_G = total(entr((one_P + other_P) / 2) - (entr(one_P) + entr(other_P)) / 2).clamp(min=0) / math.log(2)
    cosine_G = total(one_P * other_P) / (total(one_P**2) * total(other_P**2)).sqrt()
    nothing_G = (total(one_P) == 0) | (total(other_P) == 0)
    divergence_G, cosine_G = (values_G.masked_fill(nothing_G, math.nan) for values_G in (divergence_G, cosine_G))
    weight_G = tables[1].tokens_G
    found = {"jensen_shannon": divergence_G, "cosine": cosine_G}
    return MetricResult(
        metric=f"change_{group}",
        layer=counts.layer,
        value=mean(found[measure], weight_G),
        top_k=1 if first else counts.top_k,
        num_columns=counts.num_columns,
        values={
            **{name: mean(values_G, weight_G) for name, values_G in found.items()},
            **{f"{name}_by_group": mean(values_G) for name, values_G in found.items()},
        },
        table={"label": torch.from_numpy(common), "count": weight_G, "value": found[measure], **found},
        min_count=min_count,
        conventions={"measure": measure, "unit": "bits", "ranks": "first" if first else "all"},
    )
