"""What a report is about: a trace, what was counted of it, and what it is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moesaic.errors import ConfigError
from moesaic.trace.accounting import Accounting
from moesaic.trace.counts.count import count
from moesaic.trace.counts.routing import LayerCounts, RoutingCounts
from moesaic.trace.report.names import TokenNames
from moesaic.trace.router_statistics import RouterStatistics
from moesaic.trace.rows import RoutingLog

DETAILED_EXPERTS = 768
FEWEST, MOST = 4, 16
TABLES = frozenset({"token", "next", "position", "domain", "turn", "drops"})
BAND_CELLS = 1 << 20
FEWEST_BLOCKS = 16
"""With fewer blocks of documents, which large models leave no room for, a band says nothing."""


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
        minimum: picks from which on a token counts as specific to an expert, and uses of an id.
        min_uses: uses from which on the deviation of a token id is taken.
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
    min_uses: int = 32

    @cached_property
    def counts(self) -> RoutingCounts:
        """Everything that metrics are functions of, special tokens left out.

        Raises:
            ConfigError: if the trace holds no tokens.
        """
        layers = self.log.header.layers.values()
        columns = max(sum(facts.num_columns for facts in layers) * len(self.log.header.domains), 1)
        blocks = min(BAND_CELLS // columns, 64)
        tables = TABLES | ({"block"} if blocks >= FEWEST_BLOCKS else set())
        counts = count(self.log, tables=tables, exclude=self.names.special, blocks=max(blocks, 1))
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
        return [
            f"Figures of single layers are there for {shown} of {total} MoE layers, spread evenly, to keep the page light."
        ]

    @property
    def special_note(self) -> list[str]:
        """Says that special tokens are left out, if so."""
        if not self.counts.excluded:
            return []
        return ["Special tokens (begin and end of text, padding) are left out of everything but the token explorer."]

    @property
    def has_tokens(self) -> bool:
        """Whether token ids are known."""
        ids_G = self.layers[0].group("token").label_G
        return len(ids_G) > 0 and int(ids_G.max()) >= 0

    @property
    def has_domains(self) -> bool:
        """Whether there is more than one domain."""
        return len(self.layers[0].group("domain")) > 1

    @cached_property
    def pairs(self) -> RoutingCounts:
        """Which experts were chosen together, in the layers shown in detail."""
        return count(
            self.log, layers=[layer.layer for layer in self.detailed], tables={"pairs"}, exclude=self.names.special
        )
