"""Attention of one new token over a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.infer.decode import cache, source
from moesaic.infer.decode.linear import FastLinear
from moesaic.infer.decode.norm import FastNorm
from moesaic.infer.decode.swap import PLAN, Fast
from moesaic.layer.kernels.native import decode

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
# Keywords that change nothing here: the position is in cos and sin, and the cache was given.
_IDLE = frozenset({"position_ids", "use_cache", "output_router_logits", "return_dict"})


class FastAttention(Fast):
    """Rotary attention in one native call when each sequence has one new token and its cache is the plain growing one.

    It stands for its projections and head norms too, so it gives way as soon as one of them is hooked or replaced, as
    by an adapter.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = None
        if not args and not torch.compiler.is_compiling():
            y = self._step(hidden_states, **kwargs)
        if y is None:
            return self._plain.forward(self, hidden_states, *args, **kwargs)  # type: ignore[arg-type]
        return y, None

    def _step(
        self,
        x_B1D: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """The output (B, 1, D), or None if this call is not such a step."""
        own: Any = self
        if x_B1D.dim() != 3 or x_B1D.shape[1] != 1 or x_B1D.shape[0] > decode.ROWS_MOST or position_embeddings is None:
            return None
        layer = cache.layer_of(past_key_values, own.layer_idx)
        if layer is None or own.config._attn_implementation != "sdpa" or not self._idle(kwargs):
            return None
        if own.training and own.attention_dropout:
            return None
        plan = self._planned(x_B1D)
        cos, sin = position_embeddings
        if plan is None or cos.dtype is not x_B1D.dtype or cos.shape[-1] != own.head_dim:
            return None
        held, _ = cache.held_by(layer)
        length = held.shape[2] + 1
        mask_BL = None
        if attention_mask is not None:
            if attention_mask.dtype is not torch.bool or attention_mask.shape[1:] != (1, 1, length):
                return None
            mask_BL = attention_mask[:, 0, 0]
            if mask_BL.stride(1) != 1:
                mask_BL = mask_BL.contiguous()
        if held.dtype is not x_B1D.dtype or held.shape[1] != plan.kv_heads:
            return None
        keys, values = cache.room_for_one(layer)
        y_BD = plan(x_B1D[:, 0], cos[:, 0].contiguous(), sin[:, 0].contiguous(), keys, values, length, mask_BL)
        cache.take_one(layer, keys, values, length)
        return y_BD.unsqueeze(1)

    @staticmethod
    def _idle(kwargs: dict[str, Any]) -> bool:
        return all(name in _IDLE or value is None or value is False for name, value in kwargs.items())

    def _planned(self, x: Tensor) -> decode.AttentionPlan | None:
        own: nn.Module = self  # type: ignore[assignment]
        addresses = []
        for name in _PROJECTIONS:
            child = own._modules[name]
            if not isinstance(child, FastLinear) or _hooked(child):
                return None
            weight = child._parameters["weight"]
            if weight is None or not decode.suits(x, weight):
                return None
            addresses.append(weight.data_ptr())
        for name in _NORMS:
            child = own._modules.get(name)
            if child is not None:
                if not isinstance(child, FastNorm) or _hooked(child):
                    return None
                addresses.append(child._parameters["weight"].data_ptr())  # type: ignore[union-attr]
        held = own.__dict__[PLAN]
        if held is None or held[0] != addresses:
            held = own.__dict__[PLAN] = (addresses, self._plan())
        return held[1]

    def _plan(self) -> decode.AttentionPlan:
        own: Any = self
        q, k, v, o = ((child.weight, child.bias) for child in (own._modules[name] for name in _PROJECTIONS))
        norms = [own._modules.get(name) for name in _NORMS]
        q_norm, k_norm = (None if norm is None else (norm.weight, norm.variance_epsilon) for norm in norms)
        return decode.AttentionPlan(q, k, v, o, own.head_dim, own.scaling, q_norm, k_norm)


def _hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def knows(module: nn.Module) -> bool:
    """Whether a module's code is that of Llama's attention, or of Qwen3's with norms on the heads."""
    forward = type(module).forward
    normed = source.says(forward, *source.ATTENTION_WITH_HEAD_NORMS)
    if not normed and not source.says(forward, *source.ATTENTION):
        return False
    rotation = source.global_of(forward, "apply_rotary_pos_emb")
    half = None if rotation is None else source.global_of(rotation, "rotate_half")
    return (
        half is not None
        and source.says(rotation, source.ROTATION)
        and source.says(half, source.ROTATE_HALF)
        and all((f"{name}" in module._modules) == normed for name in _NORMS)
    )
