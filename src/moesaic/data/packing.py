"""Documents joined and cut into sequences of one length, with the boundaries between documents known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from moesaic.data.store import TokenStore
from moesaic.errors import DataError

IGNORED_LABEL = -100
"""Label of a position that no loss counts, by the convention of transformers."""


class Batch(TypedDict):
    """Tensors of shape (B, T), int64; `task_ids` (B,). All but the last two are model inputs.

    Attributes:
        input_ids: token ids.
        labels: the same ids; the model shifts them. -100 where nothing is to be predicted.
        attention_mask: 1 for tokens and 0 for padding; present only where an objective leaves places empty.
        position_ids: position in the document; present only with `isolate_documents`.
        modality_ids: the domain, as the model's modality; present only with `domains_are: modality`.
        task_ids: the domain of the sequence, as its task; present only with `domains_are: task`.
        document_ids: index of the document within its split; -1 in padding.
        domain_ids: index of the domain (`PreparedData.summary.domains`); -1 in padding.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    modality_ids: NotRequired[Tensor]
    task_ids: NotRequired[Tensor]
    document_ids: Tensor
    domain_ids: Tensor


class PackedSequences(Dataset[Batch]):
    """Sequences of `sequence_length` tokens cut from the stream of documents, each token in exactly one of them.

    A map-style dataset: `sequences[i]` is one sequence with tensors of shape (T,), as HF `Trainer` takes it.

    Args:
        store: the tokenised documents.
        sequence_length: tokens in a sequence (T).
        documents: indices of the documents to take, in this order; None for all.
        keep_partial: pad the last sequence with `fill_id` (label -100) if the stream does not fill it, so that every
            token is evaluated. When False its fewer than T tokens are left out: padding would count in training as
            tokens that experts must serve.
        fill_id: id of padding.
        isolate_documents: as in `DataConfig`.
        domains_are: as in `DataConfig`. With "task" the documents are taken domain by domain, and what is left of a
            domain after its last whole sequence is left out, unless it is the last and `keep_partial` is set.
    """

    def __init__(
        self,
        store: TokenStore,
        sequence_length: int,
        *,
        documents: np.ndarray | None = None,
        keep_partial: bool = False,
        fill_id: int = 0,
        isolate_documents: bool = False,
        domains_are: Literal["modality", "task"] | None = None,
    ) -> None:
        self.sequence_length, self.fill_id, self.isolate_documents = sequence_length, fill_id, isolate_documents
        self.domains_are = domains_are
        if domains_are == "task":
            documents = np.arange(len(store.domains)) if documents is None else documents
            documents = documents[np.argsort(store.domains[documents], kind="stable")]
        self._store, self._documents = store, documents
        if documents is None:
            self._offsets = store.starts
        else:
            lengths = store.starts[documents + 1] - store.starts[documents]
            self._offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.num_tokens = int(self._offsets[-1])
        full, rest = divmod(self.num_tokens, sequence_length)
        self._length = full + (keep_partial and rest > 0)
        self._first: np.ndarray | None = None  # where each sequence starts, if not at multiples of its length
        if domains_are == "task" and documents is not None:
            self._first = self._by_domain(store.domains[documents], keep_partial)
            self._length = len(self._first)

    def __len__(self) -> int:
        return self._length

    def _by_domain(self, domains: np.ndarray, keep_partial: bool) -> np.ndarray:
        """Where sequences start that hold one domain each; `domains` of the documents, in order."""
        changes = np.flatnonzero(np.diff(domains)) + 1
        bounds = self._offsets[np.concatenate([[0], changes, [len(domains)]])]
        ends = bounds[1:] - self.sequence_length + 1
        if keep_partial:
            ends[-1] = bounds[-1]
        starts = [np.arange(start, end, self.sequence_length) for start, end in zip(bounds[:-1], ends, strict=True)]
        return np.concatenate(starts).astype(np.int64)

    def token_counts(self, vocabulary_size: int) -> np.ndarray:
        """How often each id occurs in the documents taken, int64 (vocabulary_size,).

        Raises:
            DataError: if an id is not below `vocabulary_size`.
        """
        starts, tokens = self._store.starts, self._store.tokens
        documents = range(len(starts) - 1) if self._documents is None else self._documents
        counts = np.zeros(vocabulary_size, np.int64)
        for document in documents:
            try:
                np.add.at(counts, tokens[starts[document] : starts[document + 1]], 1)
            except IndexError as error:
                raise DataError(f"vocabulary_size = {vocabulary_size} is too small: {error}") from None
        return counts

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        batch = self.batch([index % len(self)])
        sequence = Batch(
            input_ids=batch["input_ids"][0],
            labels=batch["labels"][0],
            document_ids=batch["document_ids"][0],
            domain_ids=batch["domain_ids"][0],
        )
        for name in ("position_ids", "modality_ids", "task_ids"):
            if (rows := batch.get(name)) is not None:
                sequence[name] = rows[0]
        return sequence

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Sequences `indices` as one batch, B = len(indices)."""
        index_B1 = np.asarray(indices, dtype=np.int64)[:, None]
        first_B1 = index_B1 * self.sequence_length if self._first is None else self._first[index_B1]
        stream_BT = first_B1 + np.arange(self.sequence_length)
        filled_BT = stream_BT < self.num_tokens
        # Padding reads the last token, and is overwritten below.
        stream_BT = np.minimum(stream_BT, self.num_tokens - 1)
        place_BT = np.searchsorted(self._offsets, stream_BT, side="right") - 1
        document_BT = place_BT if self._documents is None else self._documents[place_BT]
        source_BT = self._store.starts[document_BT] + (stream_BT - self._offsets[place_BT])

        input_BT = np.where(filled_BT, self._store.tokens[source_BT], self.fill_id).astype(np.int64)
        labels_BT = np.where(filled_BT, input_BT, IGNORED_LABEL)
        label_BT = self._store.domains[document_BT].astype(np.int64)
        domain_BT = np.where(filled_BT, label_BT, -1)
        if self.isolate_documents:
            labels_BT[stream_BT == self._offsets[place_BT]] = IGNORED_LABEL
        document_BT = np.where(filled_BT, document_BT, -1)
        batch = Batch(
            input_ids=torch.from_numpy(input_BT),
            labels=torch.from_numpy(labels_BT),
            document_ids=torch.from_numpy(document_BT),
            domain_ids=torch.from_numpy(domain_BT),
        )
        # Padding keeps the domain of the last token, as models know no other.
        if self.domains_are == "modality":
            batch["modality_ids"] = torch.from_numpy(label_BT)
        elif self.domains_are == "task":
            batch["task_ids"] = torch.from_numpy(label_BT[:, 0].copy())
        if self.isolate_documents:
            batch["position_ids"] = torch.from_numpy(positions_in_documents(document_BT))
        return batch


def positions_in_documents(document_BT: np.ndarray) -> np.ndarray:
    """Count from 0 within each run of one document in a row.

    A document cut by the end of a sequence counts from 0 again in the next: no attention reaches back there.
    """
    column_T = np.arange(document_BT.shape[1])
    changes_BT = np.diff(document_BT, axis=1, prepend=document_BT[:, :1]) != 0
    return column_T - np.maximum.accumulate(np.where(changes_BT, column_T, 0), axis=1)
