"""Tiny models on every dense backbone family, with weights large enough that routing and next tokens are decided."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import moesaic
from moesaic import MoesaicForCausalLM, MoESpec

VOCABULARY = 64
NUM_EXPERTS = 4
EXPERT_SIZE = 24

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# Every dense row of `moesaic.hf.families`, with the features that make it differ from llama.
DENSE_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 16},
    "olmo": {"clip_qkv": 2.0},
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {},
    "granite": {
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "starcoder2": {"residual_dropout": 0.1, "embedding_dropout": 0.1, "sliding_window": 6},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {"tie_word_embeddings": True},
}
# One family for each way of doing things: plain, query norms, sandwich norms and soft caps, biases without gate.
CORE_FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "gemma3_text")


def backbone_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Stock config of a tiny dense model without dropout unless the family's features or `overrides` set it."""
    return AutoConfig.for_model(model_type, **{**_COMMON, **DENSE_FAMILIES[model_type], **overrides})


def dense_model(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A stock dense model in eval mode."""
    torch.manual_seed(0)
    return randomise(AutoModelForCausalLM.from_config(backbone_config(model_type, **overrides))).eval()


def tiny_spec(model_type: str = "llama", **overrides: Any) -> MoESpec:
    """Four experts of the family's kind in every layer but the first, two picks, both balance losses."""
    experts: dict[str, Any] = {"num_experts": NUM_EXPERTS, "intermediate_size": EXPERT_SIZE}
    if model_type == "gpt2":
        experts |= {"gated": False, "bias": True, "activation": "gelu_new"}
    values: dict[str, Any] = {
        "experts": experts,
        "router": {"top_k": 2},
        "layers": {"first_dense": 1},
        "balance": [
            {"type": "load_balancing", "coefficient": 0.1},
            {"type": "z_loss", "coefficient": 0.01},
        ],
    }
    return MoESpec.from_dict(values | overrides, where="moe")


def tiny_model(model_type: str = "llama", backbone: dict[str, Any] | None = None, **spec: Any) -> MoesaicForCausalLM:
    """A moesaic model in eval mode without dropout."""
    torch.manual_seed(0)
    config = backbone_config(model_type, **(backbone or {}))
    model = randomise(moesaic.build(config, tiny_spec(model_type, **spec)))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def copy_of(model: MoesaicForCausalLM) -> MoesaicForCausalLM:
    """A copy that a test may change."""
    return copy.deepcopy(model)


def randomise(model: Any) -> Any:
    """Random values for all weights and biases."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(std=0.2, generator=generator)
    return model


def token_ids(batch: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    """Random ids without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradient of every parameter; parameters that got none are an error."""
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient reached {missing}"
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    """Equal up to `tolerance` (of torch.testing.assert_close); exactly equal by default."""
    tolerance = tolerance or {"rtol": 0.0, "atol": 0.0}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
