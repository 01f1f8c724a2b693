"""`count`: one pass over a routing log, in bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.trace.counts.groups import GroupCounts
from moesaic.trace.counts.neighbours import Aligned, Beside, Neighbours
from moesaic.trace.counts.routing import TABLES, LayerCounts, RoutingCounts
from moesaic.trace.counts.tables import DenseTable, DropTable, SparseTable
from moesaic.trace.header import LayerFacts
from moesaic.trace.rows import RoutingLog, Rows, TokenColumns
from moesaic.trace.storage.file import TraceFile

DEFAULT_TABLES = frozenset(TABLES) - {"previous", "adjacent"}
_MOST_BUCKETS = 4096
_POSITION_CELLS, _DROP_CELLS = 1 << 20, 1 << 19
_DENSE_FLOW = 1 << 16


def count(
    log: RoutingLog,
    *,
    layers: Collection[int] | None = None,
    exclude: Collection[int] = (),
    tables: Collection[str] = DEFAULT_TABLES,
    positions: int | None = None,
    blocks: int = 64,
    max_pairs: int = 4_000_000,
    predicted_T: Tensor | None = None,
) -> RoutingCounts:
    """Count a routing log in one pass, whatever its length.

    Memory: the token tables ("token", "previous", "next", "predicted") take at most 24 `max_pairs` bytes each, over all
    layers, and one layer of them as much again while they are joined; "position" 25 MB with the default of `positions`;
    "drops" 80 MB; "block" 24 bytes for each of the `blocks`, domain, column and layer; "pairs" 8 bytes for each pair of
    columns and layer, as does "adjacent" (480 MB for 60 layers of 1,000 experts: leave "pairs" out, or count some layers
    at a time); "flow" as much as a token table at most. 10 million rows of 60 layers of 128 experts take 340 MB in all.

    Args:
        log: the trace.
        layers: only these; None for all.
        exclude: ids of special tokens (padding, begin of text), which are left out of all counts. They still took
            capacity, and what dropped for that stays counted with the tokens that it dropped from.
        tables: what to count besides loads, of `TABLES`. All but "previous" and "adjacent" by default.
        positions: buckets for positions at most; neighbours are merged where a document is longer. None: up to 4,096 in
            the table of positions and 256 for drops, fewer (32 at least) for large models and many domains.
        blocks: blocks of documents in each domain, between which bootstrap bands are drawn. Up to so many documents
            each has its own.
        max_pairs: of token ids and columns, over all layers, in each token table. Above it the rarest ids are
            forgotten (`GroupCounts.forgotten`); the counts of the others stay exact.
        predicted_T: id that the model predicts after each token, in the order of the log's rows; for "predicted".

    Raises:
        ConfigError: for a table or layer that does not exist, or settings out of range.
    """
    _check(log, layers, tables, positions, blocks, max_pairs)
    facts = {i: fact for i, fact in sorted(log.header.layers.items()) if layers is None or i in layers}
    columns = max(sum(fact.num_columns for fact in facts.values()), 1)
    settings = _Settings(
        tables=frozenset(tables) - (frozenset() if predicted_T is not None else {"predicted"}),
        exclude=np.array(sorted(exclude), dtype=np.int64),
        position_buckets=positions or _buckets(_POSITION_CELLS // columns, _MOST_BUCKETS),
        drop_buckets=positions or _buckets(_DROP_CELLS // max(len(facts) * len(log.header.domains) * blocks, 1), 256),
        blocks=blocks,
        max_pairs=max(max_pairs // max(len(facts), 1), 2),
        predicted_T=None if predicted_T is None else predicted_T.numpy(),
    )
    counters = {index: _LayerCounter(index, fact, settings) for index, fact in facts.items()}
    flow = _Flow(facts, settings.max_pairs) if "flow" in settings.tables else None
    # Weights are most of a file, and nothing here reads them.
    every = log.rows(layers, weights=False, scores=False) if isinstance(log, TraceFile) else log.rows(layers)
    for rows in every:
        choice_TK = counters[rows.layer].add(rows)
        if flow is not None:
            flow.add(rows, choice_TK)
    return RoutingCounts(
        header=log.header,
        layers={index: counter.counts() for index, counter in counters.items()},
        flow={} if flow is None else flow.counts(),
        tables=settings.tables,
        blocks=blocks,
        documents=max((counter.documents for counter in counters.values()), default=0),
        excluded=frozenset(exclude),
    )


def _buckets(most: int, limit: int) -> int:
    """A power of two, so that widths double evenly, from 32 to the limit."""
    return min(max(1 << max(most, 1).bit_length() - 1, 32), limit)


def _check(
    log: RoutingLog,
    layers: Collection[int] | None,
    tables: Collection[str],
    positions: int | None,
    blocks: int,
    max_pairs: int,
) -> None:
    for layer in layers or ():
        if layer not in log.header.layers:
            known = sorted(log.header.layers)
            raise ConfigError("layers", layer, "is not in the trace", f"choose of {known}")
    for table in tables:
        if table not in TABLES:
            raise ConfigError("tables", table, "is not a table", f"choose of {', '.join(TABLES)}")
    for name, value in (("positions", positions), ("blocks", blocks), ("max_pairs", max_pairs)):
        if value is not None and value < 1:
            raise ConfigError(name, value, "is below 1", "choose 1 or more")


class _Settings:
    """What `count` was asked for."""

    def __init__(
        self,
        *,
        tables: frozenset[str],
        exclude: np.ndarray,
        position_buckets: int,
        drop_buckets: int,
        blocks: int,
        max_pairs: int,
        predicted_T: np.ndarray | None,
    ) -> None:
        self.tables, self.exclude, self.predicted_T = tables, exclude, predicted_T
        self.position_buckets, self.drop_buckets = position_buckets, drop_buckets
        self.blocks, self.max_pairs = blocks, max_pairs


class _LayerCounter:
    """Counts of one layer while rows stream by."""

    def __init__(self, layer: int, facts: LayerFacts, settings: _Settings) -> None:
        self.layer, self.facts, self.settings = layer, facts, settings
        self.documents = 0
        columns = facts.num_columns
        self._load_KM = np.zeros((facts.top_k, columns), dtype=np.int64)
        self._dropped_M = np.zeros(columns, dtype=np.int64)
        self._ran_K1 = np.zeros(facts.top_k + 1, dtype=np.int64)
        self._tokens = self._rows = 0
        self._limited = False
        self._sparse = {
            name: SparseTable(name, columns, settings.max_pairs)
            for name in ("token", "previous", "next", "predicted")
            if name in settings.tables
        }
        self._dense = {
            name: DenseTable(name, columns, settings.position_buckets if name == "position" else None)
            for name in ("position", "domain", "turn", "modality", "block")
            if name in settings.tables
        }
        self._drops = {
            name: DropTable(name, settings.blocks, settings.drop_buckets)
            for name in ("place", "position", "turn")
            if "drops" in settings.tables
        }
        self._pairs, self._adjacent = (
            np.zeros((columns, columns), dtype=np.int64) if name in settings.tables else None
            for name in ("pairs", "adjacent")
        )
        self._neighbours = Neighbours()

    def add(self, rows: Rows) -> np.ndarray:
        """Count some rows; returns their choices, int64, -1 for nothing and for tokens that are left out."""
        if not len(rows):
            return np.zeros(rows.choice_TK.shape, dtype=np.int64)
        settings, tokens, columns = self.settings, rows.tokens, self.facts.num_columns
        token_T = tokens.token_T.numpy()
        choice_TK = rows.choice_TK.numpy().astype(np.int64)
        kept_T = ~np.isin(token_T, settings.exclude) if len(settings.exclude) else np.ones(len(token_T), dtype=bool)
        beside = self._neighbours.add(tokens, choice_TK)
        self.documents += int(beside.starts_T.sum())
        dropped_TK = np.zeros(choice_TK.shape, dtype=bool) if rows.dropped_TK is None else rows.dropped_TK.numpy()
        self._limited |= rows.dropped_TK is not None
        expert_TK = (choice_TK >= 0) & (choice_TK < self.facts.num_experts)
        ran_T = (expert_TK & ~dropped_TK).sum(1)
        domain_T = tokens.domain_T.numpy().astype(np.int64) * settings.blocks
        group_T = domain_T + tokens.document_T.numpy() % settings.blocks
        # Where nothing can drop there is no band to draw between blocks.
        self._add_drops(
            tokens,
            group_T if rows.dropped_TK is not None else domain_T,
            kept_T,
            expert_TK.sum(1),
            dropped_TK.sum(1),
            ran_T,
            beside.turn_starts_T,
        )

        every = kept_T.all()
        if not every:
            choice_TK = np.where(kept_T[:, None], choice_TK, -1)
        rank_K = np.arange(choice_TK.shape[1])
        key_TK = rank_K * (columns + 1) + choice_TK + 1
        self._load_KM += np.bincount(key_TK.ravel(), minlength=self._load_KM.shape[0] * (columns + 1)).reshape(
            -1, columns + 1
        )[:, 1:]
        self._dropped_M += np.bincount(choice_TK[dropped_TK & (choice_TK >= 0)], minlength=columns)
        self._ran_K1 += np.bincount(ran_T[kept_T], minlength=len(self._ran_K1))
        self._tokens += int(kept_T.sum())
        self._add_groups(tokens, group_T, choice_TK, kept_T)
        self._add_beside(beside)
        self._add_predicted(choice_TK, kept_T)
        self._rows += len(rows)
        if self._pairs is not None:
            _add_pairs(self._pairs, choice_TK, [(i, j) for i in rank_K for j in rank_K[i:]])
        if self._adjacent is not None:
            _add_pairs(self._adjacent, choice_TK, [(i, i + 1) for i in rank_K[:-1]])
        return choice_TK

    def counts(self) -> LayerCounts:
        """What was counted; the counter is then empty."""
        # Each table goes as soon as its counts are there, or both would be held.
        groups = {name: tables.pop(name).counts() for tables in (self._sparse, self._dense) for name in list(tables)}
        drops = {name: self._drops.pop(name).counts() for name in list(self._drops)}
        both = [None if pairs is None else torch.from_numpy(pairs) for pairs in (self._pairs, self._adjacent)]
        return LayerCounts(
            layer=self.layer,
            num_experts=self.facts.num_experts,
            top_k=self.facts.top_k,
            num_null=self.facts.num_null,
            router=self.facts.router,
            tokens=self._tokens,
            load_KM=torch.from_numpy(self._load_KM),
            dropped_M=torch.from_numpy(self._dropped_M),
            ran_K1=torch.from_numpy(self._ran_K1),
            limited=self._limited,
            groups={name: table for name, table in groups.items() if len(table)},
            drops={name: table for name, table in drops.items() if len(table)},
            pairs_MM=both[0],
            adjacent_MM=both[1],
        )

    def _add_drops(
        self,
        tokens: TokenColumns,
        group_T: np.ndarray,
        kept_T: np.ndarray,
        picks_T: np.ndarray,
        dropped_T: np.ndarray,
        ran_T: np.ndarray,
        turn_starts_T: np.ndarray,
    ) -> None:
        if not self._drops:
            return
        counts_TS = (kept_T, picks_T * kept_T, dropped_T * kept_T, (ran_T == 0) & kept_T)
        self._drops["place"].add(tokens.place_T.numpy().astype(np.int64), group_T, counts_TS)
        self._drops["position"].add(tokens.position_T.numpy().astype(np.int64), group_T, counts_TS)
        turn_T = tokens.turn_T.numpy().astype(np.int64)
        known_T = turn_T >= 0
        if known_T.any():
            known = [values[known_T] for values in (turn_T, group_T, *counts_TS, turn_starts_T)]
            self._drops["turn"].add(known[0], known[1], tuple(known[2:6]), known[6])

    def _add_groups(self, tokens: TokenColumns, group_T: np.ndarray, choice_TK: np.ndarray, kept_T: np.ndarray) -> None:
        labels = {
            "token": tokens.token_T,
            "position": tokens.position_T,
            "domain": tokens.domain_T,
            "turn": tokens.turn_T,
            "modality": tokens.modality_T,
        }
        for name, table in (self._sparse | self._dense).items():
            if name not in labels and name != "block":
                continue
            label_T = group_T if name == "block" else labels[name].numpy().astype(np.int64)
            use_T = kept_T & (label_T >= 0)
            if use_T.all():
                table.add(label_T, choice_TK)
            else:
                table.add(label_T[use_T], choice_TK[use_T])

    def _add_beside(self, beside: Beside) -> None:
        known_S = (beside.token_S >= 0) & (beside.next_token_S >= 0)
        for excluded in (beside.token_S, beside.next_token_S):
            known_S &= ~np.isin(excluded, self.settings.exclude)
        if "next" in self._sparse:
            self._sparse["next"].add(beside.next_token_S[known_S], beside.choice_SK[known_S])
        if "previous" in self._sparse:
            self._sparse["previous"].add(beside.token_S[known_S], beside.next_choice_SK[known_S])

    def _add_predicted(self, choice_TK: np.ndarray, kept_T: np.ndarray) -> None:
        predicted_T = self.settings.predicted_T
        if predicted_T is None or "predicted" not in self._sparse:
            return
        label_T = predicted_T[self._rows : self._rows + len(kept_T)].astype(np.int64)
        if len(label_T) < len(kept_T):
            raise ConfigError(
                "predicted_T", len(predicted_T), "is shorter than the log", "give an id for each row of a layer"
            )
        use_T = kept_T & (label_T >= 0) & ~np.isin(label_T, self.settings.exclude)
        self._sparse["predicted"].add(label_T[use_T], choice_TK[use_T])


class _Flow:
    """First choices of the same tokens in MoE layers that follow each other."""

    def __init__(self, facts: dict[int, LayerFacts], max_pairs: int) -> None:
        indices = list(facts)
        self._pairs = list(itertools.pairwise(indices))
        self._aligned = {pair: Aligned() for pair in self._pairs}
        self._tables = {
            (a, b): DenseTable("layer", facts[b].num_columns)
            if facts[a].num_columns * facts[b].num_columns <= _DENSE_FLOW
            else SparseTable("layer", facts[b].num_columns, max_pairs)
            for a, b in self._pairs
        }

    def add(self, rows: Rows, choice_TK: np.ndarray) -> None:
        columns = (rows.tokens.document_T.numpy(), rows.tokens.position_T.numpy(), choice_TK[:, 0].astype(np.int32))
        for pair in self._pairs:
            if rows.layer not in pair:
                continue
            found = self._aligned[pair].add(pair.index(rows.layer), *columns)
            if found is not None:
                first_T, second_T = (side[2].astype(np.int64) for side in found)
                both_T = (first_T >= 0) & (second_T >= 0)
                self._tables[pair].add(first_T[both_T], second_T[both_T, None])

    def counts(self) -> dict[tuple[int, int], GroupCounts]:
        return {pair: table.counts() for pair, table in self._tables.items()}


def _add_pairs(pairs_MM: np.ndarray, choice_TK: np.ndarray, ranks: list[tuple[int, int]]) -> None:
    """Count pairs of columns that a token chose with these pairs of ranks, both ways round."""
    columns = len(pairs_MM)
    for i, j in ranks:
        # One column more, for what is nothing.
        key_T = (choice_TK[:, i] + 1) * (columns + 1) + choice_TK[:, j] + 1
        found_MM = np.bincount(key_T, minlength=(columns + 1) ** 2).reshape(columns + 1, columns + 1)[1:, 1:]
        pairs_MM += found_MM if i == j else found_MM + found_MM.T
