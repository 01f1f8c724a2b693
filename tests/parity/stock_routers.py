"""Tiny stock MoE blocks around the router classes that `ROUTER_PRESETS` names, and the configs they are made of."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from moesaic.hf.router_presets import ROUTER_PRESETS, Picks, RouterPreset
from moesaic.layer import Routing, RoutingContext

T, D, N, K, VOCABULARY = 60, 32, 16, 4, 50

SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), N),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"), K),
    "hidden_size": D,
    "vocab_size": VOCABULARY,
    "n_group": 4,
    "topk_group": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "enable_moe_block": True,
    "n_shared_experts": 1,
    "zero_expert_num": 8,
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 8),
    **dict.fromkeys(("shared_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"), 8),
    **dict.fromkeys(("routed_scaling_factor", "route_scale", "router_scaling_factor"), 2.5),
    **dict.fromkeys(("moe_routed_scaling_factor", "moe_router_scaling_factor"), 2.5),
}
# Fields that decide what a router computes. Each set is tried in every family whose config has them all.
VARIATIONS: list[dict[str, Any]] = [
    {"norm_topk_prob": True},
    {"norm_topk_prob": False},
    {"n_group": 1, "topk_group": 1},
    {"topk_method": "greedy"},
    {"topk_method": "group_limited_greedy"},
    {"scoring_func": "sqrtsoftplus"},
    {"scoring_func": "sigmoid"},
    {"expert_selection_fn": "sigmoid"},
    {"expert_selection_fn": "sigmoid", "norm_topk_prob": False},
    {"use_expert_bias": False},
    {"moe_norm_min": 0.9},
    {"moe_router_logit_softcapping": 1.5},
    {"zero_expert_num": 0},
    {"router_bias": True},
]
# Fields of one family, or values that only one takes.
MORE: dict[str, list[dict[str, Any]]] = {
    "DbrxRouter": [{"moe_normalize_expert_weights": order} for order in (None, 2.0, 3.0)],
    "AXK2TopkRouter": [{"n_group": None, "topk_group": None}],
}
NEEDED: dict[str, dict[str, Any]] = {
    "Ernie4_5_VLMoeMoeTopKRouter": {"moe_intermediate_size": [8, 8]},
    "Qwen3OmniMoeTalkerTextTopKRouter": {"shared_expert_intermediate_size": 8},
}


class Case(NamedTuple):
    """A router class and the fields of its config that are not as in the plain case."""

    router: str
    fields: dict[str, Any]

    def __str__(self) -> str:
        return "-".join([self.router, *(f"{name}={value}" for name, value in self.fields.items())])


def cases() -> list[Case]:
    """The plain case of each router class, and one more for each other value of a field."""
    found = []
    for name, preset in ROUTER_PRESETS.items():
        found.append(Case(name, {}))
        config = read_config(preset)
        for fields in VARIATIONS:
            if all(_has(config, field) for field in fields):
                changes = any(getattr(config, field) != value for field, value in fields.items())
                found += [Case(name, fields)] if changes else []
        found += [Case(name, fields) for fields in MORE.get(name, [])]
    return found


def read_config(preset: RouterPreset, **fields: Any) -> PreTrainedConfig:
    """A tiny config of the preset's family: the class's defaults but for sizes and the fields given."""
    config = config_class(preset)()
    parts = [config, config.ffn_config] if preset.model_type == "dbrx" else [config]
    for part in parts:
        needed = {**NEEDED.get(preset.router, {}), **fields}
        for name, value in {**SIZES, **needed}.items():
            if _has(part, name) or name in needed:
                setattr(part, name, value)
    return config


def config_class(preset: RouterPreset) -> type[PreTrainedConfig]:
    """The class with the preset's model type."""
    module = importlib.import_module(f"transformers.models.{preset.family}.configuration_{preset.family}")
    classes = [value for value in vars(module).values() if inspect.isclass(value) and _is_config(value)]
    return next(found for found in classes if found.model_type == preset.model_type)


def _is_config(value: type) -> bool:
    return issubclass(value, PreTrainedConfig) and value is not PreTrainedConfig


def _has(config: PreTrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # a field that differs between layers can't be read before it is set
        return True


def read_block(preset: RouterPreset, config: PreTrainedConfig) -> nn.Module:
    """The stock block with random weights and selection biases, in eval mode."""
    arguments: dict[str, Any] = {}
    if "layer_idx" in inspect.signature(preset.block_class.__init__).parameters:
        arguments["layer_idx"] = 1 if preset.layers is None else next(iter(preset.layers(config)))
    block = preset.block_class(config, **arguments).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            elif tensor.shape == (VOCABULARY, K):  # experts of each token id
                tensor.copy_(torch.rand(VOCABULARY, N, generator=generator).argsort(-1)[:, :K])
    return block


def tokens(seed: int = 1) -> Tensor:
    """Random hidden states."""
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def context() -> RoutingContext:
    """Their ids and modalities."""
    ids_T = torch.randint(VOCABULARY, (T,), generator=torch.Generator().manual_seed(3))
    return RoutingContext(token_ids_T=ids_T, modality_T=ids_T % 2)


def dense_picks(picks: Picks, num_experts: int) -> tuple[Tensor, Tensor]:
    """Weight and number of picks of each expert, (T, N + 1) each; the last column is for what is no expert."""
    index_TK = picks.index_TK.clamp(max=num_experts)
    zeros_TN = torch.zeros(len(index_TK), num_experts + 1, dtype=picks.weight_TK.dtype)
    weight_TN = zeros_TN.scatter_add(1, index_TK, picks.weight_TK)
    return weight_TN, zeros_TN.scatter_add(1, index_TK, torch.ones_like(picks.weight_TK))


def dense_routing(routing: Routing) -> tuple[Tensor, Tensor]:
    """The same of our record."""
    weight_TN, picked_TN = dense_picks(Picks(routing.index_TK, routing.weight_TK), routing.num_experts)
    if routing.identity_weight_T is not None:
        last_TN = torch.arange(routing.num_experts + 1) == routing.num_experts
        weight_TN = torch.where(last_TN, routing.identity_weight_T.unsqueeze(-1), weight_TN)
    return weight_TN, picked_TN
