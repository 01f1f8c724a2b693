"""A tiny model of the same design: what `Preset.shrink` does to sizes, and what it leaves alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from moesaic.layer import LayerPlacement, MoESpec

if TYPE_CHECKING:
    from moesaic.catalog.schema import Preset

# The hidden width that is aimed at; it is this or near it, so that heads divide it.
_HIDDEN = 64
_HEADS = 4
_PICKS = 4

# Keys of stock configs that say once more what the MoE layers say.
_NUM_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")
_TOP_K = ("num_experts_per_tok", "moe_topk")
_WIDTHS = ("intermediate_size", "moe_intermediate_size")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def shrink(preset: Preset, *, max_experts: int = 16, vocabulary_size: int = 512, context_length: int = 512) -> Preset:
    """The preset with few layers, small widths and at most `max_experts` experts, to train on a laptop.

    Kept are router, score function, normalisation, losses with their coefficients, capacity, the ratio of expert, dense
    and shared widths to the hidden width, the ratio of heads to heads of keys and values, and which layers are MoE: one or
    two of them, and a dense one where there were any. A token picks at most 4 experts where their number shrinks; groups,
    null experts and devices of losses follow it. Positions that were stretched to long contexts are plain ones.

    Args:
        preset: what to shrink.
        max_experts: layers with more experts get this many; in a pyramid the largest does, others in proportion.
        vocabulary_size: rows of the embedding.
        context_length: positions.

    Raises:
        ConfigError: if the router does not fit fewer experts.
    """
    layers, placement = _placement(preset.moe.layers, preset.backbone["num_hidden_layers"])
    widths = _Widths(preset.backbone)
    moe = _moe(preset.moe, placement, widths, max_experts)
    backbone = _backbone(preset.backbone, moe, widths, layers)
    backbone |= {"vocab_size": vocabulary_size, **_positions(preset.backbone, context_length)}
    return preset.model_copy(
        update={
            "name": f"{preset.name}-shrunk",
            "title": f"{preset.title}, shrunk",
            "backbone": backbone,
            "moe": moe,
            "published": None,
            "notes": (*preset.notes, "Its sizes are shrunk, its mechanisms are not."),
        }
    )


class _Widths:
    """Heads and widths of the small model."""

    def __init__(self, backbone: dict[str, Any]) -> None:
        hidden, heads = backbone["hidden_size"], backbone["num_attention_heads"]
        ratio = heads // (backbone.get("num_key_value_heads") or heads)
        self.kv_heads = -(-_HEADS // ratio)
        self.heads = ratio * self.kv_heads
        # Some configs want a hidden width that heads divide also where a head has a width of its own.
        self.hidden = self.heads * _multiple(_HIDDEN / self.heads)
        across = heads * backbone["head_dim"] / hidden if "head_dim" in backbone else 1.0
        self.head_dim = _multiple(self.hidden * across / self.heads)
        self.before = hidden

    def scale(self, width: int) -> int:
        """A width in proportion to the hidden one, a multiple of 8."""
        return _multiple(width * self.hidden / self.before)


def _multiple(width: float) -> int:
    """The nearest multiple of 8."""
    return max(8, 8 * round(width / 8))


def _placement(layers: LayerPlacement, num_layers: int) -> tuple[int, LayerPlacement]:
    """Number of layers, and which are MoE, with values for the first and last of them in per-layer lists."""
    indices = layers.indices(num_layers)
    update: dict[str, Any]
    if layers.only is None:
        first = min(layers.first_dense, 1)
        blocks = min(len(indices), 2 if layers.every <= 3 else 1)
        count, update = first + layers.every * blocks, {"first_dense": first}
    else:
        blocks, dense = min(len(indices), 2), len(indices) < num_layers
        count, update = blocks + dense, {"only": tuple(range(dense, blocks + dense))}
    for name in ("num_experts", "top_k"):
        values = getattr(layers, name)
        if values is not None:
            update[name] = (values[0], values[-1])[-blocks:]
    return count, layers.model_copy(update=update)


def _moe(moe: MoESpec, placement: LayerPlacement, widths: _Widths, max_experts: int) -> MoESpec:
    values = moe.to_dict()
    values["layers"] = placement.to_dict()
    largest = max(placement.num_experts or (moe.experts.num_experts,))
    experts = values["experts"]
    if largest > max_experts:
        factor = max_experts / largest
        picks = values["router"].get("top_k", 1)
        fewer = min(picks, _PICKS, max_experts)
        least = min(max_experts, 2 * fewer)
        count = experts["num_experts"] = max(least, min(max_experts, round(experts["num_experts"] * factor)))
        if placement.num_experts is not None:
            counts = [max(least, round(number * factor)) for number in placement.num_experts]
            values["layers"]["num_experts"] = counts
        if placement.top_k is not None:
            values["layers"]["top_k"] = [min(number, fewer) for number in placement.top_k]
        _fit_router(values["router"], fewer, count, factor)
        for loss in values["balance"]:
            _fit_devices(loss, count)
    before = moe.experts.intermediate_size
    width = experts["intermediate_size"] = widths.scale(before)
    if moe.dense_layers is not None:
        values["dense_layers"]["intermediate_size"] = widths.scale(moe.dense_layers.intermediate_size)
    shared = values["shared_experts"]
    if shared is not None and shared["intermediate_size"] is not None:
        shared["intermediate_size"] = max(8, round(width * shared["intermediate_size"] / before))
    return MoESpec.from_dict(values, where="moe")


def _fit_router(router: dict[str, Any], picks: int, num_experts: int, factor: float) -> None:
    """Picks, null experts and groups that fit fewer experts."""
    if "top_k" in router:
        router["top_k"] = picks
    if router.get("num_null"):
        router["num_null"] = max(1, round(router["num_null"] * factor))
    groups, chosen = router.get("num_groups"), router.get("top_k_groups")
    if groups is None or chosen is None:
        return
    few = max(number for number in range(1, min(groups, _PICKS) + 1) if num_experts % number == 0)
    enough = math.ceil(picks / (num_experts // few))
    router["num_groups"], router["top_k_groups"] = few, max(enough, round(chosen * few / groups))


def _fit_devices(loss: dict[str, Any], num_experts: int) -> None:
    devices = loss.get("num_devices")
    if devices is None:
        return
    fewer = max(number for number in range(1, devices + 1) if num_experts % number == 0)
    loss["num_devices"] = fewer
    if "devices_per_token" in loss:
        loss["devices_per_token"] = min(loss["devices_per_token"], fewer)


def _backbone(backbone: dict[str, Any], moe: MoESpec, widths: _Widths, layers: int) -> dict[str, Any]:
    before = backbone["num_hidden_layers"]
    # What is told layer by layer, such as kinds of attention.
    values = {
        key: value[:layers] if isinstance(value, list) and len(value) == before else value
        for key, value in backbone.items()
    }
    values |= {"hidden_size": widths.hidden, "num_hidden_layers": layers, "num_attention_heads": widths.heads}
    found = {
        "num_key_value_heads": widths.kv_heads,
        "head_dim": widths.head_dim,
        "first_k_dense_replace": moe.layers.first_dense,
        "n_group": getattr(moe.router, "num_groups", None) or 1,
        "topk_group": getattr(moe.router, "top_k_groups", None) or 1,
        "shared_expert_intermediate_size": moe.shared_width,
        **dict.fromkeys(_NUM_EXPERTS, moe.experts.num_experts),
        **dict.fromkeys(_TOP_K, getattr(moe.router, "top_k", None)),
        **{key: widths.scale(backbone[key]) for key in _WIDTHS if key in backbone},
        **_attention(backbone, widths),
    }
    values |= {key: value for key, value in found.items() if key in backbone}
    # Ids of the original vocabulary, whether given or a default of the config, are none of the small one's.
    return values | dict.fromkeys(SPECIAL_TOKENS)


def _attention(backbone: dict[str, Any], widths: _Widths) -> dict[str, Any]:
    """What follows from the width of a head: scales of scores, and the parts of latent attention."""
    found: dict[str, Any] = {}
    head_dim = backbone.get("head_dim") or backbone["hidden_size"] // backbone["num_attention_heads"]
    if "query_pre_attn_scalar" in backbone:
        found["query_pre_attn_scalar"] = max(1, round(backbone["query_pre_attn_scalar"] * widths.head_dim / head_dim))
    if backbone.get("attention_multiplier") == 1 / head_dim:
        found["attention_multiplier"] = 1 / widths.head_dim
    if "kv_lora_rank" in backbone:
        found |= {
            key: None if backbone[key] is None else widths.scale(backbone[key])
            for key in ("q_lora_rank", "kv_lora_rank")
        }
        factor = _HIDDEN / _HEADS / backbone["v_head_dim"]
        parts = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        found |= {key: _multiple(backbone[key] * factor) for key in parts}
    return found


def _positions(backbone: dict[str, Any], length: int) -> dict[str, Any]:
    """Positions of a short context, without what stretches them to a long one."""
    before = backbone.get("max_position_embeddings", length)
    found: dict[str, Any] = {"max_position_embeddings": min(length, before)}
    rope = backbone.get("rope_parameters")
    if rope is not None and "rope_type" in rope:
        kept = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        found["rope_parameters"] = {"rope_type": "default", **kept}
    window = backbone.get("sliding_window")
    if window is not None:
        found["sliding_window"] = length if window >= before else min(window, length // 4)
    return found
