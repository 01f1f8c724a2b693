"""Byte-level BPE tokenizers: training, loading, and encoding of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moesaic.errors import DataError
from moesaic.files import is_local

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, extra_tokens: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Train byte-level BPE: every text round-trips exactly, and equal texts give an equal tokenizer.

    Args:
        texts: read once, in bounded memory (the counts of distinct words are kept).
        vocab_size: upper bound, counting 256 bytes, the two special tokens and the extra ones.
        extra_tokens: names of further special tokens, which no text becomes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, PAD_TOKEN, *extra_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        **({"extra_special_tokens": list(extra_tokens)} if extra_tokens else {}),
        padding_side="left",  # what batched generation needs; packed training sequences are never padded by it
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub.

    Raises:
        DataError: if there is none, or it has no end-of-text token.
    """
    folder = Path(path).expanduser()
    if is_local(path) and not folder.exists():
        raise DataError(f"there is no tokenizer folder {str(path)!r}; give a saved tokenizer's folder or a hub name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder if folder.exists() else str(path))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"cannot load a tokenizer from {str(path)!r} ({reason}); give a saved tokenizer's folder or a hub name"
        ) from error
    end_of_text(tokenizer)
    return tokenizer


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends each document.

    Raises:
        DataError: if the tokenizer has none: documents could not be told apart.
    """
    token_id = tokenizer.eos_token_id
    if not isinstance(token_id, int):
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no eos_token, which ends each document; set one and save it"
        )
    return token_id


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, nothing added; a special token's name written in a text is plain text, not that token."""
    encoded: Any = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    return encoded["input_ids"]


def vocabulary_limit(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex digest of all that decides how text becomes ids, and of the end-of-text id."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())))
    return hashlib.sha256(f"{content}{tokenizer.eos_token_id}".encode()).hexdigest()
