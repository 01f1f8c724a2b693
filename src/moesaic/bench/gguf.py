"""A stock Qwen3-MoE in the terms of GGUF, so that llama.cpp runs the same weights.

Names of metadata and tensors are those of llama.cpp's architecture "qwen3moe". The file itself is written by the
package `gguf`, which lives beside `llama_cpp` in an interpreter that need not be this one; what it needs is handed over
as raw numbers with an index.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moesaic.files import write_text

ARCHITECTURE = "qwen3moe"
INDEX, NUMBERS = "index.json", "numbers.bin"

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def metadata(config: Qwen3MoeConfig) -> dict[str, int | float | str]:
    """Keys and values of the model; no tokenizer, since only token ids are exchanged."""
    head_width: Any = config.head_dim
    rope: Any = config.rope_parameters
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_width,
        "attention.value_length": head_width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "vocab_size": config.vocab_size,
    }
    return {f"{ARCHITECTURE}.{key}": value for key, value in values.items()} | {"tokenizer.ggml.model": "no_vocab"}


def tensors(model: Qwen3MoeForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors; norms and routers in float32, as llama.cpp's own converter has them."""
    inner: Any = model.model
    yield "token_embd.weight", inner.embed_tokens.weight
    yield "output_norm.weight", inner.norm.weight.float()
    yield "output.weight", model.lm_head.weight
    for number, layer in enumerate(inner.layers):
        attention, block = layer.self_attn, layer.mlp
        gate_NFD, up_NFD = block.experts.gate_up_proj.chunk(2, dim=1)
        for name, tensor in {
            "attn_norm": layer.input_layernorm.weight.float(),
            "attn_q": attention.q_proj.weight,
            "attn_k": attention.k_proj.weight,
            "attn_v": attention.v_proj.weight,
            "attn_output": attention.o_proj.weight,
            "attn_q_norm": attention.q_norm.weight.float(),
            "attn_k_norm": attention.k_norm.weight.float(),
            "ffn_norm": layer.post_attention_layernorm.weight.float(),
            "ffn_gate_inp": block.gate.weight.float(),
            "ffn_gate_exps": gate_NFD,
            "ffn_up_exps": up_NFD,
            "ffn_down_exps": block.experts.down_proj,
        }.items():
            yield f"blk.{number}.{name}.weight", tensor


def hand_over(model: Qwen3MoeForCausalLM, folder: Path) -> None:
    """Write all numbers and an index of them into `folder`, for `llama_worker.write_gguf`."""
    index, position = [], 0
    with (folder / NUMBERS).open("wb") as file:
        for name, tensor in tensors(model):
            raw = tensor.detach().cpu().contiguous()
            file.write(raw.reshape(-1).view(torch.uint8).numpy().data)
            size = raw.numel() * raw.element_size()
            index.append(
                {
                    "name": name,
                    "shape": list(raw.shape),
                    "type": _TYPES[raw.dtype],
                    "width": raw.element_size(),
                    "start": position,
                }
            )
            position += size
    content = {"architecture": ARCHITECTURE, "metadata": metadata(model.config), "tensors": index}
    write_text(folder / INDEX, json.dumps(content))
