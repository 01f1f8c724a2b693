"""Which tokens of a log stand beside each other, in their document and in the next MoE layer, while rows stream by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesaic.trace.rows import TokenColumns

_WAITING_DOCUMENTS = 4096


@dataclass(frozen=True)
class Beside:
    """Pairs of tokens that follow each other in a document.

    Attributes:
        token_S: id of the first.
        choice_SK: its choices.
        next_token_S: id of the second.
        next_choice_SK: its choices.
        starts_T: rows of the batch before which nothing of their document was seen.
        turn_starts_T: rows of the batch whose turn is not that of the token before them.
    """

    token_S: np.ndarray
    choice_SK: np.ndarray
    next_token_S: np.ndarray
    next_choice_SK: np.ndarray
    starts_T: np.ndarray
    turn_starts_T: np.ndarray


class Neighbours:
    """Finds for the rows of one layer, batch by batch, the token before and after each in its document.

    The last token seen of a document waits for what follows in a later batch; of at most 4,096 documents, the newest.
    """

    def __init__(self) -> None:
        self._waiting: tuple[np.ndarray, ...] | None = None

    def add(self, tokens: TokenColumns, choice_TK: np.ndarray) -> Beside:
        """The pairs whose second token is in this batch."""
        columns = (
            tokens.document_T.numpy(),
            tokens.position_T.numpy().astype(np.int64),
            tokens.token_T.numpy().astype(np.int64),
            tokens.turn_T.numpy(),
            choice_TK,
        )
        waiting = 0
        if self._waiting is not None:
            waiting = len(self._waiting[0])
            columns = tuple(np.concatenate(pair) for pair in zip(self._waiting, columns, strict=True))
        document_S, position_S = columns[:2]
        same_S = document_S[1:] == document_S[:-1]
        order_S = np.arange(len(document_S))
        if not ((document_S[1:] > document_S[:-1]) | (same_S & (position_S[1:] > position_S[:-1]))).all():
            order_S = np.lexsort((position_S, document_S))
            columns = tuple(column[order_S] for column in columns)
            document_S, position_S = columns[:2]
            same_S = document_S[1:] == document_S[:-1]
        steps_S = same_S & (position_S[1:] == position_S[:-1] + 1)
        token_S, turn_S, choice_SK = columns[2:]
        starts_S = np.concatenate(([True], ~steps_S))
        turn_starts_S = starts_S | np.concatenate(([True], turn_S[1:] != turn_S[:-1]))
        in_order = [np.empty(len(order_S), dtype=bool) for _ in range(2)]
        for flags_S, sorted_S in zip(in_order, (starts_S, turn_starts_S), strict=True):
            flags_S[order_S] = sorted_S
        last_S = np.concatenate((document_S[1:] != document_S[:-1], [True]))
        # The newest documents have the highest numbers, and so come last.
        kept_S = np.flatnonzero(last_S)[-_WAITING_DOCUMENTS:]
        self._waiting = tuple(column[kept_S] for column in columns)
        first_S, second_S = np.flatnonzero(steps_S), np.flatnonzero(steps_S) + 1
        return Beside(
            token_S[first_S],
            choice_SK[first_S],
            token_S[second_S],
            choice_SK[second_S],
            in_order[0][waiting:],
            in_order[1][waiting:],
        )


class Aligned:
    """Zips two streams of rows by document and position: two layers of one log, or one layer of two logs.

    Rows wait until those of the same tokens come in the other stream, or later ones of it.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[np.ndarray, ...] | None] = [None, None]
        self._skipped = [0, 0]

    def add(self, stream: int, *columns: np.ndarray) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]] | None:
        """Add rows to stream 0 or 1; returns what both streams now have of the same tokens, in one order.

        Args:
            stream: 0 or 1.
            columns: document and position, and whatever else belongs to the rows.
        """
        waiting = self._waiting[stream]
        if waiting is not None:
            columns = tuple(np.concatenate(pair) for pair in zip(waiting, columns, strict=True))
        self._waiting[stream] = columns
        first, second = self._waiting
        if first is None or second is None or not len(first[0]) or not len(second[0]):
            return None
        common = min(len(first[0]), len(second[0]))
        if all(np.array_equal(a[:common], b[:common]) for a, b in zip(first[:2], second[:2], strict=True)):
            self._waiting = [tuple(column[common:] for column in side) for side in (first, second)]
            return tuple(column[:common] for column in first), tuple(column[:common] for column in second)
        key, other = ((side[0].astype(np.int64) << 32) + side[1] for side in (first, second))
        _, found, other_found = np.intersect1d(key, other, return_indices=True)
        if not len(found):
            return None
        result = tuple(column[found] for column in first), tuple(column[other_found] for column in second)
        after, other_after = int(found.max()) + 1, int(other_found.max()) + 1
        self._skipped[0] += after - len(found)
        self._skipped[1] += other_after - len(found)
        self._waiting = [
            tuple(column[after:] for column in first),
            tuple(column[other_after:] for column in second),
        ]
        return result

    @property
    def left(self) -> tuple[int, int]:
        """Rows of each stream that found no partner."""
        first, second = (0 if side is None else len(side[0]) for side in self._waiting)
        return first + self._skipped[0], second + self._skipped[1]
