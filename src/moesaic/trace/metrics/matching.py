"""Experts of two runs have no common numbers: match them by what they see before comparing."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.trace.counts.routing import LayerCounts
from moesaic.trace.header import TraceHeader
from moesaic.trace.rows import NOTHING, RoutingLog, Rows


@dataclass(frozen=True)
class ExpertMatch:
    """Which expert of another run each expert of this one is.

    Attributes:
        expert_N: for each expert of the first, its partner in the other, int64; a permutation.
        similarity_N: how alike the partners are, cosine of the columns, float64; NaN for an expert that nothing chose.
    """

    expert_N: Tensor
    similarity_N: Tensor


def match_experts(counts: LayerCounts, other: LayerCounts, *, group: str = "token", first: bool = False) -> ExpertMatch:
    """The one-to-one matching of experts that makes the columns f_{x,e} of both runs most alike.

    f_{x,e} is the share of expert e among the selections of token id x; columns are compared by their cosine over the
    ids that both runs saw, and the sum over matched pairs is largest (Hungarian method, `scipy`). Null experts keep
    their numbers.

    Args:
        counts: of the run whose experts are to be renumbered.
        other: of the run whose numbers they get.
        group: the grouping whose columns are compared.
        first: first choices only.

    Raises:
        ConfigError: if the layers have different numbers of experts, share no group, or scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ConfigError(
            "scipy", None, "is not installed, and matching needs it", "pip install 'moesaic[analysis]'"
        ) from None
    if (counts.num_experts, counts.num_null) != (other.num_experts, other.num_null):
        raise ConfigError(
            "other",
            (other.num_experts, other.num_null),
            f"are not the experts and nulls of the first, {(counts.num_experts, counts.num_null)}",
            "match runs of one architecture",
        )
    tables = [side.group(group) for side in (counts, other)]
    common = np.intersect1d(tables[0].label_G.numpy(), tables[1].label_G.numpy())
    if not len(common):
        raise ConfigError("group", group, "has no group in both runs", "trace both on the same text")
    size = counts.num_experts
    similarity_NN, norms = torch.zeros(size, size, dtype=torch.float64), [torch.zeros(size, dtype=torch.float64)] * 2
    # Some ids at a time: the columns are as long as the vocabulary.
    for start in range(0, len(common), 4096):
        ids = torch.from_numpy(common[start : start + 4096])
        shares_GN = []
        for side, table in enumerate(tables):
            counts_GM = table[torch.isin(table.label_G, ids)].table_GM(first=first).to(torch.float64)
            shares_GN.append((counts_GM / counts_GM.sum(-1, keepdim=True).clamp(min=1))[:, :size])
            norms[side] = norms[side] + (shares_GN[-1] ** 2).sum(0)
        similarity_NN += shares_GN[0].T @ shares_GN[1]
    similarity_NN /= (norms[0].sqrt().unsqueeze(-1) * norms[1].sqrt()).where(similarity_NN > 0, 1.0)
    rows, columns = linear_sum_assignment(similarity_NN.numpy(), maximize=True)
    expert_N = torch.from_numpy(columns).long()[torch.from_numpy(rows).long().argsort()]
    found_N = similarity_NN[torch.arange(size), expert_N]
    unused_N = (norms[0] == 0) | (norms[1][expert_N] == 0)
    return ExpertMatch(expert_N, found_N.masked_fill(unused_N, math.nan))


def renumbered(log: RoutingLog, experts: Mapping[int, Tensor]) -> RoutingLog:
    """The log with other numbers of its experts: `experts[layer][i]` is the new number of expert i.

    Args:
        log: a trace.
        experts: a permutation for each layer that changes, (N,) or, with null experts, (M,).

    Raises:
        ConfigError: if one is no permutation, or for no layer of the trace.
    """
    for layer, new_N in experts.items():
        facts = log.header.layers.get(layer)
        if facts is None:
            raise ConfigError("experts", layer, "is not a layer of the trace", f"choose of {sorted(log.header.layers)}")
        sizes = (facts.num_experts, facts.num_columns)
        if len(new_N) not in sizes or not torch.equal(new_N.sort().values, torch.arange(len(new_N))):
            raise ConfigError(
                "experts", new_N.tolist(), "is no permutation of the experts", f"number 0 to {sizes[0] - 1}"
            )
    return _Renumbered(log, experts)


class _Renumbered:
    def __init__(self, log: RoutingLog, experts: Mapping[int, Tensor]) -> None:
        self._log = log
        # One entry more at the end, which nothing (-1) finds.
        self._new = {
            layer: torch.cat(
                [new_N, torch.arange(len(new_N), log.header.layers[layer].num_columns), torch.tensor([NOTHING])]
            )
            for layer, new_N in experts.items()
        }

    @property
    def header(self) -> TraceHeader:
        return self._log.header

    def rows(self, layers: Collection[int] | None = None) -> Iterator[Rows]:
        for rows in self._log.rows(layers):
            new_M1 = self._new.get(rows.layer)
            if new_M1 is None:
                yield rows
                continue
            choice_TK = new_M1[rows.choice_TK.long()].to(rows.choice_TK.dtype)
            scores_TM = rows.scores_TM
            if scores_TM is not None:
                scores_TM = scores_TM[:, new_M1[:-1].argsort()]
            yield replace(rows, choice_TK=choice_TK, scores_TM=scores_TM)
