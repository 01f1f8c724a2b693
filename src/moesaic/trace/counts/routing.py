"""`RoutingCounts`: what metrics are functions of, integer counts of a routing log that one pass collects (`count`).

The reduction follows OpenMoE (arXiv 2402.01739, section 4 and appendix E) and OLMoE (2409.02060, section 5): token x
expert, position x expert, domain x expert, expert x expert and drops by position. Counts are int64 and divided in float64;
counts of disjoint texts are added.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.trace.counts.groups import DropCounts, GroupCounts
from moesaic.trace.header import TraceHeader

TABLES = (
    "token",
    "previous",
    "next",
    "predicted",
    "position",
    "domain",
    "turn",
    "modality",
    "block",
    "pairs",
    "adjacent",
    "flow",
    "drops",
)
"""What `count` can count besides loads; "predicted" needs predictions, "turn" and "modality" a trace that knows them."""


@dataclass(frozen=True)
class LayerCounts:
    """Counts of one layer. Special tokens that were left out are in none of them but `DropCounts.sequences_G`.

    Attributes:
        layer: index of the decoder layer.
        num_experts: N.
        top_k: K, the most selections of a token.
        num_null: null experts, the columns from N on.
        router: kind of router.
        tokens: tokens counted.
        load_KM: selections of each column by rank, before drops, int64; the first row is that of the best choices.
        dropped_M: selections of each column that a capacity dropped, int64.
        ran_K1: tokens that 0, 1, ..., K experts computed, int64 (K + 1,).
        limited: whether something could drop picks.
        groups: counts by group, by `GroupCounts.name`; what was not counted is not there.
        drops: picks dropped by "place", by "position" and, where turns are known, by "turn".
        pairs_MM: tokens that chose both columns, int64, symmetric, the diagonal is that of the columns alone; None if
            not counted.
        adjacent_MM: the same for columns of neighbouring ranks only (first with second, second with third), without a
            diagonal; None if not counted.
    """

    layer: int
    num_experts: int
    top_k: int
    num_null: int
    router: str
    tokens: int
    load_KM: Tensor
    dropped_M: Tensor
    ran_K1: Tensor
    limited: bool = False
    groups: dict[str, GroupCounts] = field(default_factory=dict)
    drops: dict[str, DropCounts] = field(default_factory=dict)
    pairs_MM: Tensor | None = None
    adjacent_MM: Tensor | None = None

    @property
    def num_columns(self) -> int:
        """M, experts and null experts."""
        return self.num_experts + self.num_null

    @property
    def chosen_M(self) -> Tensor:
        """Selections of each column, before drops, int64 (M,)."""
        return self.load_KM.sum(0)

    @property
    def first_M(self) -> Tensor:
        """Selections with rank 1, int64 (M,)."""
        return self.load_KM[0]

    @property
    def load_N(self) -> Tensor:
        """Picks that each expert computed: without nulls and dropped ones, int64 (N,)."""
        return (self.chosen_M - self.dropped_M)[: self.num_experts]

    @property
    def dropped(self) -> int:
        """Picks that a capacity dropped."""
        return int(self.dropped_M.sum())

    @property
    def unserved(self) -> int:
        """Tokens that no expert computed."""
        return int(self.ran_K1[0])

    def group(self, name: str) -> GroupCounts:
        """The counts of one grouping.

        Raises:
            ConfigError: if it was not counted.
        """
        if name not in self.groups:
            known = ", ".join(self.groups) or "none"
            raise ConfigError("group", name, f"was not counted in layer {self.layer}", f"counted are: {known}")
        return self.groups[name]


@dataclass(frozen=True)
class RoutingCounts:
    """Counts of a routing log; `count` makes them, `+` adds those of disjoint text.

    Attributes:
        header: what was traced; numbers of domains are positions in `header.domains`.
        layers: counts by the index of the decoder layer, lowest first.
        flow: for MoE layers that follow each other, (a, b): the tokens by their first choice in a (the group) and in b
            (the column); empty if not counted.
        tables: what was counted, of `TABLES`.
        blocks: documents were dealt to so many blocks, those of each domain to blocks of their own, whose number is
            domain * blocks + document % blocks.
        documents: documents seen.
        excluded: ids that were left out.
    """

    header: TraceHeader
    layers: dict[int, LayerCounts]
    flow: dict[tuple[int, int], GroupCounts] = field(default_factory=dict)
    tables: frozenset[str] = frozenset()
    blocks: int = 64
    documents: int = 0
    excluded: frozenset[int] = frozenset()

    def layer(self, index: int) -> LayerCounts:
        """The counts of one layer.

        Raises:
            ConfigError: if it was not counted.
        """
        if index not in self.layers:
            raise ConfigError("layer", index, "was not counted", f"counted are: {sorted(self.layers)}")
        return self.layers[index]

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        """The counts of both, whose texts must be disjoint; domains are matched by name.

        Raises:
            ConfigError: if the counts are of different models or were made with different settings.
        """
        _check_alike(self, other)
        names = (*self.header.domains, *(name for name in other.header.domains if name not in self.header.domains))
        code_D = torch.tensor([names.index(name) for name in other.header.domains])
        layers = {
            index: _added(counts, _recoded(other.layers[index], code_D, self.blocks))
            for index, counts in self.layers.items()
        }
        return replace(
            self,
            header=self.header.model_copy(update={"domains": names}),
            layers=layers,
            flow={pair: counts + other.flow[pair] for pair, counts in self.flow.items()},
            documents=self.documents + other.documents,
        )


def _check_alike(one: RoutingCounts, other: RoutingCounts) -> None:
    def facts(counts: RoutingCounts) -> dict[int, tuple[int, int]]:
        return {index: (layer.num_experts, layer.num_null) for index, layer in counts.layers.items()}

    for name, of in (
        ("layers", facts),
        ("tables", lambda counts: sorted(counts.tables)),
        ("blocks", lambda counts: counts.blocks),
        ("excluded", lambda counts: sorted(counts.excluded)),
    ):
        if of(one) != of(other):
            raise ConfigError(
                name, of(other), f"is not that of the other counts ({of(one)})", "count the same model the same way"
            )


def _recoded(counts: LayerCounts, code_D: Tensor, blocks: int) -> LayerCounts:
    """With other numbers of the domains."""
    groups = dict(counts.groups)
    if "domain" in groups:
        groups["domain"] = groups["domain"].relabelled(code_D[groups["domain"].label_G])
    if "block" in groups:
        label_G = groups["block"].label_G
        groups["block"] = groups["block"].relabelled(code_D[label_G // blocks] * blocks + label_G % blocks)
    drops = {name: replace(drop, domain_G=code_D[drop.domain_G]) for name, drop in counts.drops.items()}
    return replace(counts, groups=groups, drops=drops)


def _added(one: LayerCounts, other: LayerCounts) -> LayerCounts:
    top_k = max(one.top_k, other.top_k)  # they differ where tokens have different numbers of picks

    def joined(name: str) -> dict:
        mine, theirs = getattr(one, name), getattr(other, name)
        return {
            key: mine[key] + theirs[key] if key in mine and key in theirs else mine.get(key, theirs.get(key))
            for key in (*mine, *(key for key in theirs if key not in mine))
        }

    def both(name: str) -> Tensor | None:
        mine, theirs = getattr(one, name), getattr(other, name)
        return None if mine is None or theirs is None else mine + theirs

    loads_KM = (F.pad(counts.load_KM, (0, 0, 0, top_k - counts.top_k)) for counts in (one, other))
    ran_K1 = (F.pad(counts.ran_K1, (0, top_k - counts.top_k)) for counts in (one, other))
    return replace(
        one,
        top_k=top_k,
        tokens=one.tokens + other.tokens,
        load_KM=sum(loads_KM),
        dropped_M=one.dropped_M + other.dropped_M,
        ran_K1=sum(ran_K1),
        limited=one.limited or other.limited,
        groups=joined("groups"),
        drops=joined("drops"),
        pairs_MM=both("pairs_MM"),
        adjacent_MM=both("adjacent_MM"),
    )
