"""Tiny models and batches, the same on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import moesaic
from moesaic.hf import MoesaicForCausalLM
from moesaic.layer import MoESpec

BACKBONE = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def spec(**changes: Any) -> MoESpec:
    values: dict[str, Any] = {
        "experts": {"num_experts": 8, "intermediate_size": 8},
        "router": {"type": "top_k", "top_k": 2},
        "balance": [{"type": "load_balancing", "coefficient": 0.02}],
    }
    return MoESpec.from_dict(values | changes)


def model(moe: MoESpec | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32, **backbone: Any) -> Any:
    torch.manual_seed(seed)
    built: MoesaicForCausalLM = moesaic.build({**BACKBONE, **backbone}, moe or spec())
    return built.to(dtype).train()


def batches(count: int, *, rows: int = 8, length: int = 12, vocabulary: int = 61, seed: int = 1) -> list[Tensor]:
    """Token ids (rows, length) of global batches."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (rows, length), generator=generator) for _ in range(count)]
