"""What a report is about: a trace, what was counted of it, and what it is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moesaic.errors import ConfigError
from moesaic.trace.accounting import Accounting
from moesaic.trace.counting import count
from moesaic.trace.counts import LayerCounts, RoutingCounts
from moesaic.trace.metrics import TokenShare
from moesaic.trace.report.names import TokenNames
from moesaic.trace.router_statistics import RouterStatistics
from moesaic.trace.rows import RoutingLog

DETAILED_EXPERTS = 1_536
FEWEST, MOST = 4, 32


@dataclass(frozen=True)
class Named:
    """A further trace.

    Attributes:
        name: of the model or checkpoint.
        log: its routing of the same text.
        step: training steps of a checkpoint; None if unknown.
    """

    name: str
    log: RoutingLog
    step: int | None = None


@dataclass(frozen=True)
class Subject:
    """Everything that sections read.

    Attributes:
        log: the trace.
        title: name of the model.
        names: text of token ids.
        accounting: size and cost of the model, if there is one.
        facts: further lines for the head of the page.
        statistics: what each router said of itself.
        checkpoints: traces of earlier states of the model on the same text, earliest first.
        other: a trace of another model on the same text.
        top: tokens listed for each expert.
        minimum: occurrences from which on a token or a group counts.
    """

    log: RoutingLog
    title: str
    names: TokenNames
    accounting: Accounting | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    statistics: Sequence[RouterStatistics] = ()
    checkpoints: Sequence[Named] = ()
    other: Named | None = None
    top: int = 8
    minimum: int = 5

    @cached_property
    def counts(self) -> RoutingCounts:
        """Everything that metrics are functions of.

        Raises:
            ConfigError: if the trace holds no tokens.
        """
        counts = count(self.log, tables={"token", "position", "domain", "turn", "drops"})
        if not counts.layers or not max(layer.tokens for layer in counts.layers.values()):
            raise ConfigError("trace", 0, "holds no tokens", "run the model inside the record block")
        return counts

    @cached_property
    def layers(self) -> list[LayerCounts]:
        """Counts of all layers, lowest first."""
        return [counts for _, counts in sorted(self.counts.layers.items())]

    @property
    def num_tokens(self) -> int:
        """Recorded tokens."""
        return max(layer.tokens for layer in self.layers)

    @property
    def num_documents(self) -> int:
        """Recorded texts."""
        return self.counts.documents

    @property
    def num_experts(self) -> int:
        """Experts of the layer with the most."""
        return max(layer.num_experts for layer in self.layers)

    @property
    def detailed(self) -> list[LayerCounts]:
        """Layers shown in detail: all, or as many as keep the page light, evenly spread, the first and the last among them."""
        limit = int(np.clip(DETAILED_EXPERTS // self.num_experts, FEWEST, MOST))
        chosen = np.linspace(0, len(self.layers) - 1, min(limit, len(self.layers))).round().astype(int)
        return [self.layers[index] for index in np.unique(chosen)]

    @property
    def detail_note(self) -> list[str]:
        """Says that some layers are left out, if so."""
        shown, total = len(self.detailed), len(self.layers)
        if shown == total:
            return []
        return [f"To keep the page light, {shown} of {total} MoE layers are shown here, spread evenly."]

    @property
    def has_tokens(self) -> bool:
        """Whether token ids are known."""
        return bool(len(self.layers[0].group("token").label_G)) and int(self.layers[0].group("token").label_G[-1]) >= 0

    @cached_property
    def _pairs(self) -> RoutingCounts:
        return count(self.log, layers=[layer.layer for layer in self.detailed], tables={"pairs"})

    def together(self, layer: LayerCounts) -> tuple[np.ndarray, float]:
        """Share of each expert's tokens that also picked another, NaN for unused ones; and that of independent picks."""
        pairs_MM = self._pairs.layer(layer.layer).pairs_MM
        assert pairs_MM is not None, "they were counted"
        pairs_NN = pairs_MM[: layer.num_experts, : layer.num_experts].double().numpy()
        load_N = pairs_NN.diagonal().copy()
        with np.errstate(invalid="ignore"):
            share_NN = pairs_NN / load_N[:, None]
        np.fill_diagonal(share_NN, np.where(load_N > 0, 0.0, np.nan))
        beside = np.nansum(share_NN.sum(1) * load_N) / max(load_N.sum(), 1)
        return share_NN, beside / max(layer.num_experts - 1, 1)

    def top_tokens(self, layer: LayerCounts) -> tuple[list[list[TokenShare]], list[list[TokenShare]]]:
        """Tokens that each expert prefers, and tokens that it sees most, best first."""
        group, load = layer.group("token"), layer.chosen_M.tolist()
        by_lift: list[list[TokenShare]] = [[] for _ in load]
        by_count: list[list[TokenShare]] = [[] for _ in load]
        tokens, ids = group.tokens_G.tolist(), group.label_G.tolist()
        pairs = zip(group.group_P.tolist(), group.column_P.tolist(), group.chosen_P.tolist(), strict=True)
        for number, column, picks in pairs:
            item = TokenShare(ids[number], picks, picks / load[column] / (tokens[number] / layer.tokens))
            by_count[column].append(item)
            if picks >= self.minimum:
                by_lift[column].append(item)
        specific = [sorted(found, key=lambda item: (-item.lift, -item.count))[: self.top] for found in by_lift]
        return specific, [sorted(found, key=lambda item: -item.count)[: self.top] for found in by_count]
