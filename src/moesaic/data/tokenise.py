"""One pass from documents to token files: train the tokenizer, encode, split, write."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from moesaic.data.config import DataConfig, TrainBPE
from moesaic.data.documents import Document, capped
from moesaic.data.sources import read_documents
from moesaic.data.split import is_validation
from moesaic.data.store import TokenWriter, token_dtype
from moesaic.data.summary import Amount, DataSummary
from moesaic.data.tokenizer import encode, end_of_text, load_tokenizer, train_tokenizer, vocabulary_limit
from moesaic.errors import DataError

_ENCODED_TOGETHER = 2**20  # characters


def tokenise(config: DataConfig, folder: Path, *, progress: bool) -> None:
    """Fill `folder` with `tokenizer/`, `train/`, `validation/` (see `store`) and `summary.json`.

    Memory is bounded by the largest documents, whatever the size of the corpus; sources are read twice if the tokenizer
    is trained.

    Raises:
        DataError: if a source is missing, malformed or there is no text at all.
    """
    with _progress_bar(progress) as bar:
        tokenizer = _tokenizer(config, bar)
        tokenizer.save_pretrained(folder / "tokenizer")
        documents = _counted(read_documents(config.sources), bar, "Encoding text")
        summary = _write(documents, tokenizer, config.validation_fraction, folder)
    if not summary.domains:
        raise DataError(
            f"the corpus is empty: no text in the sources {[source.type for source in config.sources]}; "
            f"check `data.sources`"
        )
    (folder / "summary.json").write_text(summary.model_dump_json(indent=2), encoding="utf-8")


def _tokenizer(config: DataConfig, bar: Progress) -> PreTrainedTokenizerBase:
    if not isinstance(config.tokenizer, TrainBPE):
        return load_tokenizer(config.tokenizer.path)
    documents = _counted(read_documents(config.sources), bar, "Training the tokenizer")
    # Merges learnt from held-out text would make its loss look better than it is.
    training = (document for document in documents if not is_validation(document, config.validation_fraction))
    training = capped(training, max_bytes=config.tokenizer.max_bytes)
    return train_tokenizer(
        (document.text for document in training), config.tokenizer.vocab_size, config.tokenizer.extra_tokens
    )


def _write(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, validation_fraction: float, folder: Path
) -> DataSummary:
    dtype = token_dtype(vocabulary_limit(tokenizer))
    domains: dict[str, int] = {}
    amounts: dict[str, dict[str, Amount]] = {split: defaultdict(Amount) for split in ("train", "validation")}
    with ExitStack() as stack:
        writers = {split: stack.enter_context(TokenWriter(folder / split, dtype)) for split in amounts}
        for document, token_ids in _encoded(documents, tokenizer):
            split = "validation" if is_validation(document, validation_fraction) else "train"
            writers[split].append(token_ids, domains.setdefault(document.domain, len(domains)))
            amounts[split][document.domain] += Amount(
                documents=1, tokens=len(token_ids), bytes=len(document.text.encode())
            )
    return DataSummary(domains=tuple(domains), token_dtype="uint16" if dtype == np.uint16 else "uint32", **amounts)


def _encoded(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its token ids, EOS at the end."""
    end = end_of_text(tokenizer)
    for group in _groups(documents):
        for document, token_ids in zip(group, encode(tokenizer, [item.text for item in group]), strict=True):
            yield document, [*token_ids, end]


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups large enough to encode in parallel, and small enough to bound memory."""
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if characters >= _ENCODED_TOGETHER:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _progress_bar(enabled: bool) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed:,.0f} documents"),
        TimeElapsedColumn(),
    )
    # On stderr, so that output for machines stays clean.
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not enabled)


def _counted(documents: Iterable[Document], bar: Progress, description: str) -> Iterator[Document]:
    task = bar.add_task(description, total=None)
    for document in documents:
        yield document
        bar.advance(task)
