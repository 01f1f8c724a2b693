"""A corpus of a few short files, and the tokenizer and token files made from it."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from moesaic.data import DataConfig, JsonlSource, TrainBPE, train_tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A JSONL file of 60 distinct documents in two domains."""
    path = tmp_path / "corpus.jsonl"
    rows = [
        {"text": f"document {n}: " + "the quick brown fox " * (n % 7 + 1), "kind": "odd" if n % 2 else "even"}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def config(corpus: Path) -> DataConfig:
    return DataConfig(
        sources=(JsonlSource(paths=(str(corpus),), domain_field="kind"),),
        tokenizer=TrainBPE(vocab_size=300),
        sequence_length=16,
        batch_size=4,
        validation_fraction=0.2,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog. " * 3], 280)
