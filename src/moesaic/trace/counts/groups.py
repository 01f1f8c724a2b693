"""`GroupCounts` and `DropCounts`: what groups of tokens (ids, positions, domains) chose, and what they lost."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupCounts:
    """How often each group of tokens chose each column (expert or null expert) of one layer, before drops.

    Sparse: a pair is a group and a column that it chose at least once, so the size follows the text and not the
    vocabulary: 24 bytes a pair and 16 a group.

    Attributes:
        name: what groups the tokens: "token" (the id of the token itself), "previous" and "next" (the ids beside it in
            its document), "predicted" (what the model predicts after it), "position", "domain", "turn", "modality",
            "block" (a share of the documents, for bootstrap), "layer" (the first choice in the MoE layer before).
        num_columns: M.
        label_G: what the group stands for (an id, the first position of a bucket, the number of a domain), int64,
            ascending.
        tokens_G: tokens in the group, int64.
        group_P: group of each pair, int32, ascending.
        column_P: its column, int32, ascending within a group.
        chosen_P: selections with any rank, int64, at least 1.
        first_P: selections with rank 1, the best, int64.
        width: labels from `label_G[g]` to `label_G[g] + width - 1` belong to group g; above 1 for buckets of positions.
        forgotten: tokens whose group is left out, because there were more pairs than `count` was to keep.
        forgotten_F: labels of those groups, int64.
    """

    name: str
    num_columns: int
    label_G: Tensor
    tokens_G: Tensor
    group_P: Tensor
    column_P: Tensor
    chosen_P: Tensor
    first_P: Tensor
    width: int = 1
    forgotten: int = 0
    forgotten_F: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.label_G)

    def table_GM(self, *, first: bool = False) -> Tensor:
        """The counts as a dense table, int64 (G, M).

        Args:
            first: count selections with rank 1 only.
        """
        table_GM = torch.zeros(len(self), self.num_columns, dtype=torch.int64)
        table_GM[self.group_P, self.column_P] = self.first_P if first else self.chosen_P
        return table_GM

    def picks_G(self, *, first: bool = False) -> Tensor:
        """Selections of each group, int64 (G,)."""
        counts_P = self.first_P if first else self.chosen_P
        return torch.zeros(len(self), dtype=torch.int64).index_add(0, self.group_P, counts_P)

    def load_M(self, *, first: bool = False) -> Tensor:
        """Selections of each column over all groups, int64 (M,)."""
        counts_P = self.first_P if first else self.chosen_P
        return torch.zeros(self.num_columns, dtype=torch.int64).index_add(0, self.column_P, counts_P)

    def __getitem__(self, which_G: Tensor) -> GroupCounts:
        """The groups that a mask (bool) or their numbers (int64, ascending) name."""
        number_G = which_G.nonzero().squeeze(-1) if which_G.dtype == torch.bool else which_G
        new_G = torch.full((len(self),), -1, dtype=torch.int64)
        new_G[number_G] = torch.arange(len(number_G))
        group_P = new_G[self.group_P]
        kept_P = group_P >= 0
        return replace(
            self,
            label_G=self.label_G[number_G],
            tokens_G=self.tokens_G[number_G],
            group_P=group_P[kept_P],
            column_P=self.column_P[kept_P],
            chosen_P=self.chosen_P[kept_P],
            first_P=self.first_P[kept_P],
        )

    def at_least(self, min_count: int) -> GroupCounts:
        """Only the groups of at least so many tokens."""
        return self if min_count <= 1 else self[self.tokens_G >= min_count]

    def relabelled(self, new_G: Tensor) -> GroupCounts:
        """With other labels; groups with the same one are added up.

        Args:
            new_G: the new label of each group, int64.
        """
        return _grouped(
            self,
            *(new_G, self.tokens_G),
            *(new_G[self.group_P], self.column_P, self.chosen_P, self.first_P),
        )

    def __add__(self, other: GroupCounts) -> GroupCounts:
        """The counts of two disjoint texts; buckets of positions get the larger width."""
        width = max(self.width, other.width)
        # What one side forgot, the other knows in part only.
        forgotten_F = torch.cat([self.forgotten_F, other.forgotten_F]).unique()
        parts, forgotten = [], self.forgotten + other.forgotten
        for part in (self, other):
            lost_G = torch.isin(part.label_G, forgotten_F)
            forgotten += int(part.tokens_G[lost_G].sum())
            parts.append((part[~lost_G] if lost_G.any() else part).relabelled(part.label_G[~lost_G] // width * width))
        joined = [torch.cat([getattr(part, name) for part in parts]) for name in ("label_G", "tokens_G")]
        pairs = [torch.cat([part.label_G[part.group_P] for part in parts])]
        pairs += [torch.cat([getattr(part, name) for part in parts]) for name in ("column_P", "chosen_P", "first_P")]
        summed = _grouped(self, *joined, *pairs)
        return replace(summed, width=width, forgotten=forgotten, forgotten_F=forgotten_F)


@dataclass(frozen=True)
class DropCounts:
    """Picks that a capacity dropped, in one layer, by label (place, position or turn), domain and block of documents.

    Attributes:
        name: "place" (place in the row of the batch, what a capacity fills by), "position" (in the document) or "turn".
        label_G: first place or position of the bucket, or the turn, int64.
        domain_G: number of the domain, int64.
        block_G: number of the block of documents, int64.
        tokens_G: tokens, int64.
        picks_G: their picks of experts (null experts can't be full), int64.
        dropped_G: picks dropped, int64.
        unserved_G: tokens that no expert computed, int64.
        sequences_G: sequences that reach the label: tokens at the first place of the bucket, whether they are left out
            of the statistics or not, int64. For turns, documents are not told apart and this counts tokens.
        width: places in a bucket.
    """

    name: str
    label_G: Tensor
    domain_G: Tensor
    block_G: Tensor
    tokens_G: Tensor
    picks_G: Tensor
    dropped_G: Tensor
    unserved_G: Tensor
    sequences_G: Tensor
    width: int = 1

    def __len__(self) -> int:
        return len(self.label_G)

    def __getitem__(self, which_G: Tensor) -> DropCounts:
        """The rows that a mask or indices name."""
        return replace(self, **{name: getattr(self, name)[which_G] for name in DROP_COLUMNS})

    def by(self, *names: str, parts: int | None = None) -> DropCounts:
        """Added up over what is not named; the labels left out are 0.

        Args:
            names: of "label", "domain" and "block".
            parts: sum up labels to this many equal stretches of their range, 4 for quarters; the label of a stretch
                is its number.
        """
        label_G = self.label_G if "label" in names else torch.zeros_like(self.label_G)
        if parts is not None and len(self):
            label_G = self.label_G * parts // (int(self.label_G.max()) + self.width)
        # Sequences go on from bucket to bucket: of a stretch, those that reach its first one.
        first_label_L = torch.full((int(label_G.max()) + 1 if len(self) else 0,), torch.iinfo(torch.int64).max)
        first_label_L = first_label_L.scatter_reduce(0, label_G, self.label_G, "amin")
        return _summed(
            replace(
                self,
                label_G=label_G,
                domain_G=self.domain_G if "domain" in names else torch.zeros_like(label_G),
                block_G=self.block_G if "block" in names else torch.zeros_like(label_G),
                sequences_G=torch.where(self.label_G == first_label_L[label_G], self.sequences_G, 0),
            )
        )

    def __add__(self, other: DropCounts) -> DropCounts:
        """The counts of two disjoint texts; buckets get the larger width."""
        width = max(self.width, other.width)
        parts = [part.widened(width) for part in (self, other)]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in DROP_COLUMNS}
        return _summed(replace(self, **joined, width=width))

    def widened(self, width: int) -> DropCounts:
        """In buckets of this width, a multiple of the present one; sequences are those that reach the new bucket."""
        if width == self.width:
            return self
        label_G = self.label_G // width * width
        reached_G = torch.where(self.label_G == label_G, self.sequences_G, 0)
        return _summed(replace(self, label_G=label_G, sequences_G=reached_G, width=width))


DROP_COLUMNS = tuple(column.name for column in fields(DropCounts) if column.name.endswith("_G"))


def sum_by_key(key_S: np.ndarray, *values_S: np.ndarray) -> tuple[np.ndarray, ...]:
    """The distinct keys, ascending, and for each the sums of the values, exact in int64."""
    if not len(key_S):
        return (key_S, *values_S)
    order_S = np.argsort(key_S, kind="stable")
    sorted_S = key_S[order_S]
    start_P = np.flatnonzero(np.concatenate(([True], sorted_S[1:] != sorted_S[:-1])))
    return (sorted_S[start_P], *(np.add.reduceat(value_S[order_S], start_P) for value_S in values_S))


def _grouped(
    like: GroupCounts,
    label_S: Tensor,
    tokens_S: Tensor,
    pair_label_S: Tensor,
    column_S: Tensor,
    chosen_S: Tensor,
    first_S: Tensor,
) -> GroupCounts:
    """Counts in any order, with repeated groups and pairs, added up."""
    label_G, tokens_G = sum_by_key(label_S.numpy(), tokens_S.numpy())
    key_S = pair_label_S.numpy() * like.num_columns + column_S.numpy()
    key_P, chosen_P, first_P = sum_by_key(key_S, chosen_S.numpy(), first_S.numpy())
    columns = pair_columns(label_G, tokens_G, key_P, chosen_P, first_P, like.num_columns)
    return GroupCounts(like.name, like.num_columns, *columns, width=like.width, forgotten=like.forgotten)


def pair_columns(
    label_G: np.ndarray,
    tokens_G: np.ndarray,
    key_P: np.ndarray,
    chosen_P: np.ndarray,
    first_P: np.ndarray,
    num_columns: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The six tensors of `GroupCounts`, in its order.

    Args:
        label_G: labels, ascending.
        tokens_G: their tokens.
        key_P: label times `num_columns` plus column, ascending.
        chosen_P: selections.
        first_P: selections with rank 1.
        num_columns: M.
    """
    return (
        torch.from_numpy(label_G),
        torch.from_numpy(tokens_G),
        torch.from_numpy(np.searchsorted(label_G, key_P // num_columns).astype(np.int32)),
        torch.from_numpy((key_P % num_columns).astype(np.int32)),
        torch.from_numpy(chosen_P),
        torch.from_numpy(first_P),
    )


def _summed(counts: DropCounts) -> DropCounts:
    """Rows with equal keys added up."""
    key_G = np.stack([counts.label_G.numpy(), counts.domain_G.numpy(), counts.block_G.numpy()])
    limits = [int(values.max(initial=0)) + 1 for values in key_G]
    flat_G = (key_G[0] * limits[1] + key_G[1]) * limits[2] + key_G[2]
    flat_G, *sums_G = sum_by_key(flat_G, *(getattr(counts, name).numpy() for name in DROP_COLUMNS[3:]))
    found_G = [flat_G // (limits[1] * limits[2]), flat_G // limits[2] % limits[1], flat_G % limits[2], *sums_G]
    columns = {name: torch.from_numpy(values) for name, values in zip(DROP_COLUMNS, found_G, strict=True)}
    return replace(counts, **columns)
