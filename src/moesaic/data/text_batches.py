"""Batches over all of some text, for evaluation and inspection: no split, no shuffling, no cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase

from moesaic.data.config import JsonlSource, Source, TextSource
from moesaic.data.loader import OrderedBatches
from moesaic.data.packing import PackedSequences
from moesaic.data.sources import read_documents
from moesaic.data.store import TokenStore, TokenWriter, token_dtype
from moesaic.data.tokenizer import encode, end_of_text, vocabulary_limit
from moesaic.errors import DataError


class TextBatches:
    """Every token of `sources`, by domain, in fixed batches. Use it as a context manager: it holds temporary files.

    Args:
        sources: where documents come from.
        tokenizer: how they become tokens; each document ends with EOS.
        sequence_length: T.
        batch_size: B.

    Attributes:
        by_domain: batches of each domain.

    Raises:
        DataError: if a source is missing, malformed, or there is no text.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        *,
        sequence_length: int = 256,
        batch_size: int = 8,
    ) -> None:
        self._folder = TemporaryDirectory(prefix="moesaic-text-")
        folder, dtype = Path(self._folder.name) / "text", token_dtype(vocabulary_limit(tokenizer))
        domains: dict[str, int] = {}
        with TokenWriter(folder, dtype) as writer:
            for document in read_documents(sources):
                [token_ids] = encode(tokenizer, [document.text])
                index = domains.setdefault(document.domain, len(domains))
                writer.append([*token_ids, end_of_text(tokenizer)], index)
        if not domains:
            named = [
                path for source in sources if isinstance(source, TextSource | JsonlSource) for path in source.paths
            ]
            raise DataError(f"there is no text in {', '.join(named) or 'the sources'}; give files that hold some")
        store = TokenStore(folder, dtype)
        self.by_domain = {
            domain: OrderedBatches(
                PackedSequences(
                    store,
                    sequence_length,
                    documents=store.documents_of(index),
                    keep_partial=True,
                    fill_id=end_of_text(tokenizer),
                ),
                batch_size,
            )
            for domain, index in domains.items()
        }

    def __enter__(self) -> TextBatches:
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()
