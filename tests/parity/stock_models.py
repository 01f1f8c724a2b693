"""Tiny random models of the stock MoE families, with everything random that a trained model would have non-zero."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
GROUPED: dict[str, Any] = {
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
# Every family with the features of its published models: dense layers, groups, shared experts, scaling.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 6},
    "qwen2_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "qwen3_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "head_dim": 16,
    },
    "olmoe": {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3},
    "deepseek_v2": {**LATENT_ATTENTION, **GROUPED, "topk_method": "group_limited_greedy", "n_shared_experts": 2},
    "deepseek_v3": {**LATENT_ATTENTION, **GROUPED},
    "glm4_moe": {**GROUPED, "n_group": 1, "topk_group": 1, "head_dim": 16, "use_qk_norm": True},
    "glm4_moe_lite": {**LATENT_ATTENTION, **GROUPED, "num_hidden_layers": 2, "n_shared_experts": 2},
    "dots1": {**GROUPED, "head_dim": 16, "n_shared_experts": 1, "norm_topk_prob": True},
    "exaone_moe": {
        **{name: value for name, value in GROUPED.items() if name != "n_routed_experts"},
        "num_experts": 8,
        "num_shared_experts": 2,
        "head_dim": 16,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "solar_open": {
        **{name: value for name, value in GROUPED.items() if name != "first_k_dense_replace"},
        "num_hidden_layers": 2,
        "head_dim": 16,
    },
    "hunyuan_v1_moe": {"intermediate_size": 16, "num_experts": 8, "moe_topk": 3, "head_dim": 16},
    "mellum": {
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "head_dim": 16,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "flex_olmo": {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3},
    "gpt_oss": {
        "intermediate_size": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 6,
        "swiglu_limit": 0.5,
    },
    "granitemoe": {
        "intermediate_size": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
}
# Fields that change what is computed, or where.
VARIATIONS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("qwen2_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
    ("qwen2_moe", {"num_hidden_layers": 4, "mlp_only_layers": [0, 2]}),
    ("qwen2_moe", {"num_hidden_layers": 4, "mlp_only_layers": [3], "decoder_sparse_step": 2}),
    ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [1]}),
    ("olmoe", {"norm_topk_prob": True}),
    ("olmoe", {"tie_word_embeddings": True}),
    ("mixtral", {"tie_word_embeddings": True, "sliding_window": None}),
    ("deepseek_v2", {"topk_method": "greedy"}),
    ("deepseek_v2", {"topk_method": "greedy", "n_group": None, "topk_group": None, "norm_topk_prob": True}),
    ("deepseek_v3", {"norm_topk_prob": False, "first_k_dense_replace": 0}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "q_lora_rank": None}),
    ("glm4_moe", {"n_group": 4, "topk_group": 2}),
    ("mellum", {"norm_topk_prob": False, "mlp_layer_types": ["sparse", "sparse"]}),
    ("exaone_moe", {"norm_topk_prob": False, "n_group": 1, "topk_group": 1}),
    ("granitemoe", {"tie_word_embeddings": True, "num_experts_per_tok": 3}),
]


def stock_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Config of a tiny model."""
    return AutoConfig.for_model(model_type, **{**COMMON, **FAMILIES.get(model_type, {}), **overrides})


def stock_model(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A tiny model in eval mode whose experts run transformers' own eager code."""
    config = stock_config(model_type, **overrides)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return randomise(model).eval()


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Random values for all weights, biases and selection biases, large enough that routing is decided."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    return model


def token_ids(batch: int = 2, length: int = 12) -> torch.Tensor:
    """Random ids without the special ones."""
    return torch.randint(3, COMMON["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))
