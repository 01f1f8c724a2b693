"""Tiny whole models of further MoE families, from the config that tests of their routers use."""

from __future__ import annotations

from typing import Any

import torch
from tests.parity.stock_models import randomise
from tests.parity.stock_routers import read_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesaic.hf.router_presets import RouterPreset

# Families whose models are small once these fields are; others need fields of their own.
ROUTERS = (
    "AfmoeTokenChoiceRouter",
    "AriaTextTopKRouter",
    "BeamTopKRouter",
    "Cohere2MoeTopKRouter",
    "DeepseekV4TopKRouter",
    "Ernie4_5_MoeTopKRouter",
    "GraniteMoeSWATopKRouter",
    "GraniteMoeSharedTopKRouter",
    "HYV3TopKRouter",
    "Inkling2TopKRouter",
    "Kolibri1TopKRouter",
    "LagunaTopKRouter",
    "MiMoV2FlashTopkRouter",
    "MiniMaxM2TopKRouter",
    "MiniMaxM3VLTopKRouter",
    "MiniMaxTopKRouter",
    "Qwen3NextTopKRouter",
    "Qwen3_5MoeTopKRouter",
)
_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "first_k_dense_replace": 0,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(preset: RouterPreset) -> PreTrainedModel:
    """A model of two layers in evaluation mode."""
    config = read_config(preset)
    for name, value in _SIZES.items():
        if hasattr(config, name):
            setattr(config, name, value)
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list):
            setattr(config, name, kinds[-2:])
    torch.manual_seed(0)
    return randomise(AutoModelForCausalLM.from_config(config, experts_implementation="eager")).eval()
