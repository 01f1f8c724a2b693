"""What a capacity would have dropped: applied afterwards to the log of a run without one."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import CapacityConfig, Routing, RoutingContext
from moesaic.layer.capacity import limit_capacity
from moesaic.trace.header import LayerFacts, TraceHeader
from moesaic.trace.rows import RoutingLog, Rows, TokenColumns

_CELLS = 1 << 22
"""Tokens times columns that are laid out at once."""


def apply_capacity(
    log: RoutingLog, capacity: CapacityConfig, *, training: bool = True, batch: int | None = None
) -> RoutingLog:
    """The log as it would be with a capacity, for `count` and `drop_rates`: same selections, other drops and weights.

    Slots are given out by the code that layers run, to whole rows of a batch: a row starts at place 0, and its tokens
    must follow each other in the log. So logs of generation with a cache, whose passes hold a token of each sequence,
    can't be used. An expert with n selections in a group drops max(0, n - C), whatever the order of filling.

    Args:
        log: a trace, with or without drops of its own, which are forgotten.
        capacity: factor, rounding, scope, policy and order of choices. `choice_order="token_first"` fills a token's
            picks together, "rank_first" all first choices before any second one.
        training: take `capacity.factor`, else `capacity.eval_factor`.
        batch: rows that were together in a batch, for the scope "batch".

    Raises:
        ConfigError: if nothing is limited in this mode, `batch` and the scope do not fit each other, the policy needs
            scores that the log lacks, or, while rows are read, a row does not start at place 0.
    """
    if not capacity.limits(training):
        name = "factor" if training else "eval_factor"
        raise ConfigError(name, None, "limits nothing", f"set {name}")
    if (capacity.scope == "batch") != (batch is not None):
        raise ConfigError(
            "batch",
            batch,
            f"does not fit the scope {capacity.scope!r}",
            "give it with the scope 'batch', and only then",
        )
    if batch is not None and batch < 1:
        raise ConfigError("batch", batch, "is below 1", "choose 1 or more")
    if capacity.policy in ("probability", "batch_priority") and not log.header.has_scores:
        raise ConfigError(
            "policy", capacity.policy, "compares scores, which the trace lacks", "record with scores, or choose another"
        )
    return _Limited(log, capacity, training, batch or 1)


class _Limited:
    """A log whose rows are limited as they are read."""

    def __init__(self, log: RoutingLog, capacity: CapacityConfig, training: bool, batch: int) -> None:
        self._log, self._capacity, self._training, self._batch = log, capacity, training, batch

    @property
    def header(self) -> TraceHeader:
        return self._log.header

    def rows(self, layers: Collection[int] | None = None) -> Iterator[Rows]:
        waiting: dict[int, list[Rows]] = {}
        for rows in self._log.rows(layers):
            if not len(rows):
                continue
            held = waiting.setdefault(rows.layer, [])
            held.append(rows)
            if not (rows.tokens.place_T == 0).any():
                continue
            # The last row of the batch may go on in what comes next.
            joined = _joined(held)
            starts = (joined.tokens.place_T == 0).nonzero().squeeze(-1)
            groups = (len(starts) - 1) // self._batch
            if groups < 1:
                waiting[rows.layer] = [joined]
                continue
            end = int(starts[groups * self._batch])
            waiting[rows.layer] = [joined[end:]]
            yield self._limit(joined[:end])
        for held in waiting.values():
            yield self._limit(_joined(held))

    def _limit(self, rows: Rows) -> Rows:
        """Whole rows of the batch, and whole batches but for the last one."""
        facts = self.header.layers[rows.layer]
        place_T = rows.tokens.place_T.long()
        starts = (place_T == 0).nonzero().squeeze(-1)
        row_T = (place_T == 0).cumsum(0) - 1
        if not len(starts) or row_T[0] < 0 or not torch.equal(torch.arange(len(rows)) - starts[row_T], place_T):
            raise ConfigError(
                "log",
                f"layer {rows.layer}",
                "has rows of a batch whose tokens do not follow each other from place 0",
                "use a trace of whole sequences, without a cache and with all of their tokens",
            )
        if self._capacity.scope == "batch":
            together = self._batch
        else:
            together = max(_CELLS // ((int(place_T.max()) + 1) * facts.num_columns), 1)
        edges = [*starts[::together].tolist(), len(rows)]
        parts = [self._chunk(rows[begin:end], facts) for begin, end in itertools.pairwise(edges)]
        dropped_TK, weight_TK = (torch.cat(column) for column in zip(*parts, strict=True))
        return replace(rows, dropped_TK=dropped_TK, weight_TK=weight_TK)

    def _chunk(self, rows: Rows, facts: LayerFacts) -> tuple[Tensor, Tensor]:
        """Dropped selections and remaining weights of rows that pass the layer together, padded to one length."""
        place_T = rows.tokens.place_T.long()
        length, size = int(place_T.max()) + 1, int((place_T == 0).sum())
        cell_T = ((place_T == 0).cumsum(0) - 1) * length + place_T
        columns = facts.num_columns
        choice_TK = rows.choice_TK.long()
        choice_TK = choice_TK.masked_fill(choice_TK < 0, columns)
        choice_SK = torch.full((size * length, choice_TK.shape[1]), columns).index_copy(0, cell_T, choice_TK)
        weight_SK = torch.zeros(choice_SK.shape).index_copy(0, cell_T, rows.weight_TK)
        scores_SM = torch.zeros(size * length, columns + 1)
        if rows.scores_TM is not None:
            scores_SM[cell_T, :-1] = rows.scores_TM
        else:
            # Only the order of a token's choices is read, which is that of the columns of `choice_TK`.
            falling_K = torch.arange(choice_TK.shape[1], 0, -1).to(scores_SM.dtype)
            scores_SM.scatter_(1, choice_SK, falling_K.expand(choice_SK.shape))
        scores_SM = scores_SM[:, :columns]
        real_S = torch.zeros(size * length, dtype=torch.bool).index_fill(0, cell_T, True)
        routing = Routing(
            index_TK=choice_SK.masked_fill(choice_SK >= facts.num_experts, facts.num_experts),
            weight_TK=weight_SK,
            logits_TN=scores_SM,
            scores_TN=scores_SM,
            selection_TN=scores_SM,
            num_null=facts.num_null,
            chosen_TK=choice_SK,
        )
        context = RoutingContext(batch_size=size, mask_T=real_S)
        limited = limit_capacity(routing, self._capacity, context, training=self._training, layer=rows.layer)
        assert limited.dropped_TK is not None
        return limited.dropped_TK[cell_T], limited.weight_TK[cell_T]


def _joined(held: list[Rows]) -> Rows:
    if len(held) == 1:
        return held[0]
    scores = [rows.scores_TM for rows in held]
    return Rows(
        held[0].layer,
        TokenColumns.joined([rows.tokens for rows in held]),
        torch.cat([rows.choice_TK for rows in held]),
        torch.cat([rows.weight_TK for rows in held]),
        scores_TM=torch.cat([part for part in scores if part is not None]) if held[0].scores_TM is not None else None,
    )
