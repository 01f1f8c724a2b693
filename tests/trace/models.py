"""The small model that the tests of this room trace."""

from __future__ import annotations

from typing import Any

import torch

import moesaic
from moesaic.hf import MoesaicForCausalLM

NUM_EXPERTS, TOP_K, LAYERS = 6, 2, (1, 2)


def tiny_model(backbone: dict[str, Any] | None = None, **spec: Any) -> MoesaicForCausalLM:
    """Three llama layers, the first of them dense, in evaluation mode."""
    torch.manual_seed(0)
    sizes = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    }
    moe = {
        "experts": {"num_experts": NUM_EXPERTS, "intermediate_size": 16},
        "router": {"top_k": TOP_K},
        "shared_experts": {"num_experts": 1},
        "layers": {"first_dense": 1},
    }
    return moesaic.build(sizes | (backbone or {}), moe | spec).eval()
