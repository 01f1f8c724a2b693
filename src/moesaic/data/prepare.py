"""From the `data` section of a run to batches, through a cache of token files on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from moesaic.data.config import DataConfig, PretrainedTokenizer
from moesaic.data.loader import OrderedBatches, TokenBatches
from moesaic.data.mixture import MixedBatches
from moesaic.data.packing import PackedSequences
from moesaic.data.sources import fingerprint
from moesaic.data.store import TokenStore
from moesaic.data.summary import DataSummary
from moesaic.data.tokenise import tokenise
from moesaic.data.tokenizer import end_of_text, load_tokenizer, tokenizer_hash
from moesaic.errors import ConfigError, DataError
from moesaic.files import atomic_directory

_FORMAT = 1
"""Part of the cache key: raise it when the files or the way to make them change."""


@dataclass(frozen=True)
class PreparedData:
    """Tokenised text, ready to train on.

    Attributes:
        config: what it was made from.
        tokenizer: the trained or loaded tokenizer; size a model's vocabulary by `len(tokenizer)`.
        train: training sequences of all domains.
        train_by_domain: training sequences of each domain by itself; only domains with training text.
        validation: held-out sequences by domain; only domains of which a document was held out.
        summary: documents, tokens and bytes by split and domain.
        folder: cache entry with the token files and the tokenizer.
    """

    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    train: PackedSequences
    train_by_domain: dict[str, PackedSequences]
    validation: dict[str, PackedSequences]
    summary: DataSummary
    folder: Path

    def train_batches(
        self, *, batch_size: int | None = None, shard_index: int = 0, num_shards: int = 1
    ) -> TokenBatches | MixedBatches:
        """Endless shuffled batches from the start of the first epoch, mixed as `config.mixture` says.

        Args:
            batch_size: global batch size; None for `config.batch_size`.
            shard_index: rank among the data-parallel processes.
            num_shards: number of them.

        Raises:
            ConfigError: if there are fewer sequences than the batch size, shards do not divide it, or the mixture names
                a domain that there is not.
        """
        size = self.config.batch_size if batch_size is None else batch_size
        if self.config.mixture is not None:
            return MixedBatches(
                self.train_by_domain,
                self.config.mixture,
                size,
                self.config.seed,
                shard_index=shard_index,
                num_shards=num_shards,
            )
        return TokenBatches(self.train, size, self.config.seed, shard_index=shard_index, num_shards=num_shards)

    def validation_batches(self, *, batch_size: int | None = None) -> dict[str, OrderedBatches]:
        """All held-out tokens by domain, in fixed batches.

        Args:
            batch_size: sequences in a batch; None for `config.batch_size`.
        """
        size = self.config.batch_size if batch_size is None else batch_size
        return {domain: OrderedBatches(sequences, size) for domain, sequences in self.validation.items()}


def prepare_data(config: DataConfig, cache_dir: str | Path, *, progress: bool = True) -> PreparedData:
    """Read, tokenise and split the corpus, or open what an earlier call with the same input left in `cache_dir`.

    The cache entry is named by a hash of all that decides its content: sources (with size and time of local files),
    tokenizer and split. Sequence length, batch size and seed only decide how it is read. The entry appears whole or
    not at all; processes that ask for the same entry at once wait for the first to make it.

    Args:
        config: the `data` section.
        cache_dir: folder of cache entries; made if missing.
        progress: show progress on stderr.

    Raises:
        DataError: if a source or tokenizer is missing, malformed or empty.
        ConfigError: if nothing was held out, or the training text is shorter than one sequence.
    """
    folder = Path(cache_dir) / _key(config)  # first: a missing source leaves no folder behind
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with atomic_directory(folder) as temporary:
                tokenise(config, temporary, progress=progress)
    return _open(config, folder)


def _key(config: DataConfig) -> str:
    if isinstance(config.tokenizer, PretrainedTokenizer):
        tokenizer = tokenizer_hash(load_tokenizer(config.tokenizer.path))
    else:
        tokenizer = {**config.tokenizer.to_dict(), "version": tokenizers.__version__}
    content = {
        "format": _FORMAT,
        "sources": [[source.to_dict(), fingerprint(source)] for source in config.sources],
        "tokenizer": tokenizer,
        "validation_fraction": config.validation_fraction,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _open(config: DataConfig, folder: Path) -> PreparedData:
    try:
        summary = DataSummary.from_dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"the cache entry {folder} is damaged ({error}); delete it to tokenise again") from error
    tokenizer = load_tokenizer(folder / "tokenizer")
    dtype = np.dtype(summary.token_dtype)
    train, held_out = TokenStore(folder / "train", dtype), TokenStore(folder / "validation", dtype)
    _check_sizes(config, train, held_out)
    validation = {
        domain: PackedSequences(
            held_out,
            config.sequence_length,
            documents=held_out.documents_of(index),
            keep_partial=True,
            fill_id=end_of_text(tokenizer),
            isolate_documents=config.isolate_documents,
            domains_are=config.domains_are,
        )
        for index, domain in enumerate(summary.domains)
        if domain in summary.validation
    }
    by_domain = {
        domain: PackedSequences(
            train,
            config.sequence_length,
            documents=train.documents_of(index),
            isolate_documents=config.isolate_documents,
            domains_are=config.domains_are,
        )
        for index, domain in enumerate(summary.domains)
        if domain in summary.train
    }
    sequences = PackedSequences(
        train, config.sequence_length, isolate_documents=config.isolate_documents, domains_are=config.domains_are
    )
    return PreparedData(config, tokenizer, sequences, by_domain, validation, summary, folder)


def _check_sizes(config: DataConfig, train: TokenStore, held_out: TokenStore) -> None:
    if len(train.tokens) < config.sequence_length:
        raise ConfigError(
            "data.sequence_length",
            config.sequence_length,
            f"is longer than the training text ({len(train.tokens)} tokens in {len(train.domains)} documents)",
            "use shorter sequences, more text or a smaller data.validation_fraction",
        )
    if len(held_out.domains) == 0:
        raise ConfigError(
            "data.validation_fraction",
            config.validation_fraction,
            f"holds out none of the {len(train.domains)} documents",
            "use a larger fraction, or more documents (set `separator` to cut a text file into documents)",
        )
