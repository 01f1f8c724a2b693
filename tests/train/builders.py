"""A tiny corpus and tiny runs on it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from moesaic.data import DataConfig
from moesaic.train import RunConfig

DOMAINS = ("sea", "land")
_WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "dogs",
    "ran",
    "over",
    "hills",
    "and",
    "rivers",
    "to",
    "find",
    "boats",
]

BACKBONE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
MOE = {
    "experts": {"num_experts": 4, "intermediate_size": 16},
    "router": {"type": "top_k", "top_k": 2},
    "balance": [{"type": "load_balancing", "coefficient": 0.02}, {"type": "z_loss", "coefficient": 0.001}],
}
# Everything that moves once an optimiser step.
MOVING_BALANCE = {
    "router": {"type": "top_k", "top_k": 2, "score_function": "sigmoid", "selection_bias": True},
    "selection_bias_update": {"rate": {"start": 0.02, "end": 0.01}},
    "balance": [
        {"type": "load_balancing", "coefficient": {"start": 0.02, "end": 0.002, "shape": "cosine"}},
        {"type": "z_loss", "coefficient": 0.001, "adaptive": {"capacity_factor": 1.0, "decay": 0.8}},
    ],
}
# Routing that freezes after step 4 of 8; ids go up to the size of the tokenizer of `data_config`.
STABLE = {
    "router": {"type": "stable", "vocabulary_size": 280, "width": 8, "freeze_at": 0.5},
    "balance": [
        {"type": "stable_balance", "coefficient": 0.3},
        {"type": "router", "loss": "distillation", "coefficient": 1.0},
    ],
}


def write_corpus(folder: Path) -> None:
    """A text file for each domain: documents that repeat a few sentences of the domain."""
    for seed, domain in enumerate(DOMAINS):
        rng = random.Random(seed)
        sentences = [" ".join(rng.choices(_WORDS, k=8)) for _ in range(4)]
        documents = ["\n".join(rng.choices(sentences, k=5)) for _ in range(60)]
        (folder / f"{domain}.txt").write_text("\n\n".join(documents), encoding="utf-8")


def data_config(folder: Path, **changes: Any) -> DataConfig:
    """The corpus in `folder` in batches of 4 sequences of 32 tokens."""
    sources = [
        {"type": "text", "domain": name, "paths": [str(folder / f"{name}.txt")], "separator": "\n\n"}
        for name in DOMAINS
    ]
    tokenizer = {"type": "train_bpe", "vocab_size": 280}
    values = {"sources": sources, "tokenizer": tokenizer, "sequence_length": 32, "batch_size": 4, **changes}
    return DataConfig.from_dict(values)


def tiny_run(
    data: DataConfig,
    *,
    moe: bool | dict[str, Any] = True,
    dropout: float = 0.0,
    backbone: dict[str, Any] | None = None,
    **train: Any,
) -> RunConfig:
    """A run of 8 steps that evaluates and writes a checkpoint every 4; `moe` may change parts of `MOE`."""
    changes = moe if isinstance(moe, dict) else {}
    return RunConfig.from_dict(
        {
            "backbone": {**BACKBONE, "attention_dropout": dropout, **(backbone or {})},
            "moe": {**MOE, "dropout": dropout, **changes} if moe is not False else None,
            "data": data.to_dict(),
            "train": {"steps": 8, "checkpoint_every": 4, "eval_every": 4, "device": "cpu", **train},
        }
    )
