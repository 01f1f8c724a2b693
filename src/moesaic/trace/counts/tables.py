"""Tables that grow while a log is read, in bounded memory: dense ones for few groups, sparse ones for token ids."""

from __future__ import annotations

import numpy as np
import torch

from moesaic.trace.counts.groups import DROP_COLUMNS, DropCounts, GroupCounts, pair_columns, sum_by_key

_LEAST_MERGE = 1 << 15
"""New pairs that are kept beside a small sparse table before they are merged into it."""


class DenseTable:
    """Groups x columns for labels from 0 on, such as positions and domains.

    Args:
        name: of the grouping.
        num_columns: M.
        buckets: the most groups; when a label lies beyond them, neighbours are merged and the width doubles. None lets
            the table grow.
    """

    def __init__(self, name: str, num_columns: int, buckets: int | None = None) -> None:
        self.name, self.num_columns, self.buckets, self.width = name, num_columns, buckets, 1
        self._chosen_GM = np.zeros((0, num_columns), dtype=np.int64)
        self._first_GM = np.zeros((0, num_columns), dtype=np.int64)
        self._tokens_G = np.zeros(0, dtype=np.int64)

    def add(self, label_T: np.ndarray, choice_TK: np.ndarray) -> None:
        """Count tokens: the label of each, from 0, and its choices, -1 for nothing."""
        if not len(label_T):
            return
        highest = int(label_T.max())
        while self.buckets is not None and highest // self.width >= self.buckets:
            self.width *= 2
            self._map(lambda counts: _halved(counts))
        label_T = label_T // self.width
        missing = int(label_T.max()) + 1 - len(self._tokens_G)
        if missing > 0:
            self._map(lambda counts: np.concatenate([counts, np.zeros((missing, *counts.shape[1:]), np.int64)]))
        groups, columns = self._chosen_GM.shape
        self._tokens_G += np.bincount(label_T, minlength=groups)
        # One column more, for what is nothing.
        key_TK = label_T[:, None] * (columns + 1) + (choice_TK + 1)
        size = groups * (columns + 1)
        self._chosen_GM += np.bincount(key_TK.ravel(), minlength=size).reshape(groups, columns + 1)[:, 1:]
        self._first_GM += np.bincount(key_TK[:, 0], minlength=size).reshape(groups, columns + 1)[:, 1:]

    def counts(self) -> GroupCounts:
        """What was counted."""
        seen_G = np.flatnonzero(self._tokens_G)
        row_P, column_P = np.nonzero(self._chosen_GM)
        label_G = seen_G * self.width
        columns = pair_columns(
            label_G,
            self._tokens_G[seen_G],
            row_P * self.width * self.num_columns + column_P,
            self._chosen_GM[row_P, column_P],
            self._first_GM[row_P, column_P],
            self.num_columns,
        )
        return GroupCounts(self.name, self.num_columns, *columns, width=self.width)

    def _map(self, change) -> None:
        self._chosen_GM, self._first_GM, self._tokens_G = (
            change(counts) for counts in (self._chosen_GM, self._first_GM, self._tokens_G)
        )


class SparseTable:
    """Token ids x columns, only the pairs that occur.

    Args:
        name: of the grouping.
        num_columns: M.
        max_pairs: above so many pairs, the ids with the fewest tokens so far are forgotten, for good, until half are
            left; what is kept stays exact.
    """

    def __init__(self, name: str, num_columns: int, max_pairs: int) -> None:
        self.name, self.num_columns, self.max_pairs = name, num_columns, max_pairs
        # One column more counts the tokens.
        self._wide = num_columns + 1
        self._table = (np.zeros(0, np.int64),) * 3
        self._new: list[tuple[np.ndarray, ...]] = []
        self._waiting = 0
        self._forgotten_V = np.zeros(0, dtype=bool)
        self._forgotten = 0

    def add(self, label_T: np.ndarray, choice_TK: np.ndarray) -> None:
        """Count tokens: the id of each, and its choices, -1 for nothing."""
        if not len(label_T):
            return
        if len(self._forgotten_V):
            lost_T = self._forgotten_V[np.minimum(label_T, len(self._forgotten_V) - 1)]
            lost_T &= label_T < len(self._forgotten_V)
            self._forgotten += int(lost_T.sum())
            label_T, choice_TK = label_T[~lost_T], choice_TK[~lost_T]
        # Ranks apart by the last bit, so that one sort counts both; the tokens themselves have no rank.
        rank_K = (np.arange(choice_TK.shape[1]) > 0).astype(np.int64)
        key_TK = (label_T[:, None] * self._wide + choice_TK) * 2 + rank_K
        key_S = np.concatenate([key_TK[choice_TK >= 0], (label_T * self._wide + self.num_columns) * 2])
        key_P, count_P = np.unique(key_S, return_counts=True)
        self._new.append((key_P >> 1, count_P, np.where(key_P & 1, 0, count_P)))
        self._waiting += len(key_P)
        if self._waiting > max(_LEAST_MERGE, len(self._table[0]) // 4):
            self._merge()

    def counts(self) -> GroupCounts:
        """What was counted."""
        self._merge()
        key_P, chosen_P, first_P = self._table
        label_P, column_P = np.divmod(key_P, self._wide)
        tokens_P = column_P == self.num_columns
        pair_P = ~tokens_P
        columns = pair_columns(
            label_P[tokens_P],
            chosen_P[tokens_P],
            label_P[pair_P] * self.num_columns + column_P[pair_P],
            chosen_P[pair_P],
            first_P[pair_P],
            self.num_columns,
        )
        forgotten_F = torch.from_numpy(np.flatnonzero(self._forgotten_V))
        return GroupCounts(self.name, self.num_columns, *columns, forgotten=self._forgotten, forgotten_F=forgotten_F)

    def _merge(self) -> None:
        if not self._new:
            return
        parts = [self._table, *self._new]
        self._table = sum_by_key(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        self._new, self._waiting = [], 0
        if len(self._table[0]) > self.max_pairs:
            self._forget()

    def _forget(self) -> None:
        key_P, chosen_P, _ = self._table
        label_P = key_P // self._wide
        start_G = np.flatnonzero(np.concatenate(([True], label_P[1:] != label_P[:-1])))
        pairs_G = np.diff(np.append(start_G, len(key_P)))
        # The last pair of an id counts its tokens.
        tokens_G = chosen_P[start_G + pairs_G - 1]
        order_G = np.lexsort((label_P[start_G], -tokens_G))
        kept = int(np.searchsorted(np.cumsum(pairs_G[order_G]), self.max_pairs // 2, side="right"))
        lost_G = order_G[max(kept, 1) :]
        lost_V = label_P[start_G[lost_G]]
        size = max(len(self._forgotten_V), int(lost_V.max(initial=-1)) + 1)
        self._forgotten_V = np.concatenate([self._forgotten_V, np.zeros(size - len(self._forgotten_V), dtype=bool)])
        self._forgotten_V[lost_V] = True
        self._forgotten += int(tokens_G[lost_G].sum())
        kept_P = ~self._forgotten_V[np.minimum(label_P, size - 1)] | (label_P >= size)
        self._table = tuple(column[kept_P] for column in self._table)


class DropTable:
    """Drops by label (place, position, turn), domain and block of documents.

    Args:
        name: of the labels.
        blocks: blocks of documents in a domain.
        buckets: the most labels; see `DenseTable`.
    """

    STATISTICS = 5  # tokens, picks, dropped, unserved, sequences

    def __init__(self, name: str, blocks: int, buckets: int) -> None:
        self.name, self.blocks, self.buckets, self.width = name, blocks, buckets, 1
        self._counts_SGL = np.zeros((self.STATISTICS, 0, 0), dtype=np.int64)

    def add(
        self,
        label_T: np.ndarray,
        group_T: np.ndarray,
        counts_TS: tuple[np.ndarray, ...],
        starts_T: np.ndarray | None = None,
    ) -> None:
        """Count tokens.

        Args:
            label_T: label of each, from 0.
            group_T: its domain times `blocks` plus its block.
            counts_TS: tokens (0 for those left out), picks, dropped picks and tokens without an expert.
            starts_T: where a sequence reaches the label; None for tokens at the first place of a bucket.
        """
        if not len(label_T):
            return
        while int(label_T.max()) // self.width >= self.buckets:
            self.width *= 2
            counts = self._counts_SGL
            reached = counts[4, :, ::2].copy()
            self._counts_SGL = np.swapaxes(_halved(np.swapaxes(counts, 0, 2)), 0, 2).copy()
            self._counts_SGL[4] = reached
        bucket_T = label_T // self.width
        if starts_T is None:
            starts_T = label_T % self.width == 0
        _, groups, labels = self._counts_SGL.shape
        more = (max(int(group_T.max()) + 1 - groups, 0), max(int(bucket_T.max()) + 1 - labels, 0))
        if any(more):
            self._counts_SGL = np.pad(self._counts_SGL, ((0, 0), (0, more[0]), (0, more[1])))
            _, groups, labels = self._counts_SGL.shape
        key_T = group_T * labels + bucket_T
        for number, values_T in enumerate((*counts_TS, starts_T)):
            # Sums of small integers: exact in float64.
            sums = np.bincount(key_T, weights=values_T, minlength=groups * labels)
            self._counts_SGL[number] += sums.reshape(groups, labels).astype(np.int64)

    def counts(self) -> DropCounts:
        """What was counted."""
        group_G, bucket_G = np.nonzero(self._counts_SGL.any(0))
        order_G = np.lexsort((group_G, bucket_G))
        group_G, bucket_G = group_G[order_G], bucket_G[order_G]
        columns = [bucket_G * self.width, *np.divmod(group_G, self.blocks), *self._counts_SGL[:, group_G, bucket_G]]
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(values))
            for name, values in zip(DROP_COLUMNS, columns, strict=True)
        }
        return DropCounts(self.name, **tensors, width=self.width)


def _halved(counts: np.ndarray) -> np.ndarray:
    """Neighbours along the first axis added up."""
    if len(counts) % 2:
        counts = np.concatenate([counts, np.zeros((1, *counts.shape[1:]), counts.dtype)])
    return counts[::2] + counts[1::2]
