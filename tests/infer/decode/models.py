"""Tiny stock and own models to decode with, in any dtype."""

from __future__ import annotations

from typing import Any

import torch
from tests.hf.tiny import backbone_config, randomise, tiny_model, token_ids
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}

_MOE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_STOCK_MOE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen2_moe": {"shared_expert_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {},
}


def stock(model_type: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A stock model, dense or MoE, in eval mode."""
    torch.manual_seed(0)
    if model_type in _STOCK_MOE:
        config = AutoConfig.for_model(model_type, **{**_MOE, **_STOCK_MOE[model_type], **overrides})
    else:
        config = backbone_config(model_type, max_position_embeddings=256, **overrides)
    model: PreTrainedModel = randomise(AutoModelForCausalLM.from_config(config)).eval()
    return model.to(dtype)  # type: ignore[arg-type]


def own(model_type: str = "qwen3", dtype: torch.dtype = torch.float32, **spec: Any) -> Any:
    """A moesaic model in eval mode."""
    return tiny_model(model_type, backbone={"max_position_embeddings": 256}, **spec).to(dtype)


def padded_ids() -> tuple[Tensor, Tensor]:
    """(3, 9) ids padded on the left, and their mask."""
    ids = token_ids(3, 9)
    ids[0, :4], ids[2, :1] = 0, 0
    return ids, (ids != 0).long()


@torch.no_grad()
def decoded(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens (B, new) and their logits (B, new, V) in float32."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **{**GREEDY, **options}
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1).float()
