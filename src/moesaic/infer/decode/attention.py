"""Attention of one new token over a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.infer.decode import cache, source
from moesaic.infer.decode.linear import FastLinear
from moesaic.infer.decode.norm import FastNorm
from moesaic.infer.decode.swap import PLAN, Fast, runs
from moesaic.infer.decode.watch import Watch
from moesaic.layer.kernels.native import decode

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
# Keywords that change nothing here: the position is in cos and sin, and the cache was given.
_IDLE = frozenset({"position_ids", "use_cache", "output_router_logits", "return_dict"})


@dataclass(frozen=True)
class _Planned:
    """A plan, or None where there can't be one, as long as `watch` holds."""

    watch: Watch
    plan: decode.AttentionPlan | None


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
        held: _Planned | None = own.__dict__[PLAN]
        if held is None or not held.watch.holds():
            watch = Watch()
            weights = weights_of(own, watch)
            plan = None if weights is None else decode.AttentionPlan(weights)
            held = _Planned(watch, plan)
            # With a hook in the way there is no plan, and nothing that would tell when it goes.
            own.__dict__[PLAN] = held if watch.holds() else None
        if held.plan is None:
            return None
        step = step_of(own, x_B1D, position_embeddings, attention_mask, past_key_values, kwargs)
        if step is None:
            return None
        y_BD = held.plan(x_B1D[:, 0], step.address)
        step.done()
        return y_BD.unsqueeze(1)


class Step:
    """One call's place in a cache, which holds the new token when it is `done`."""

    __slots__ = ("_layer", "_length", "_place", "address")

    def __init__(self, layer: Any, place: decode.Place, length: int, address: int) -> None:
        self._layer, self._place, self._length, self.address = layer, place, length, address

    def done(self) -> None:
        """Let the cache hold the new token."""
        cache.take_one(self._layer, self._place, self._length)


def step_of(
    attention: Any, x_B1D: Tensor, rotation: Any, mask: Any, past_key_values: Any, kwargs: dict[str, Any]
) -> Step | None:
    """The step that a call of an attention layer is, or None if it is something else.

    Args:
        attention: the layer, or one with its attributes.
        x_B1D: what it attends from.
        rotation: cos and sin.
        mask: what it was given as mask.
        past_key_values: the cache.
        kwargs: all other keywords.
    """
    if x_B1D.dim() != 3 or x_B1D.shape[1] != 1 or x_B1D.shape[0] > decode.ROWS_MOST or rotation is None:
        return None
    if not decode.suits(x_B1D, attention._modules["o_proj"]._parameters["weight"]):
        return None
    layer = cache.layer_of(past_key_values, attention.layer_idx)
    if layer is None or attention.config._attn_implementation != "sdpa" or not _idle(kwargs):
        return None
    if attention.training and attention.attention_dropout:
        return None
    held, _ = cache.held_by(layer)
    batch, heads, length, width = held.shape
    dtype, length = x_B1D.dtype, length + 1
    if held.dtype is not dtype or batch != x_B1D.shape[0] or width != attention.head_dim:
        return None
    if heads * width != attention._modules["k_proj"]._parameters["weight"].shape[0]:
        return None
    cos, sin = rotation
    if cos.dtype is not dtype or cos.shape[-1] != width or not (cos.is_contiguous() and sin.is_contiguous()):
        return None
    if mask is not None and (
        mask.dtype is not torch.bool or mask.shape[1:] != (1, 1, length) or (length > 1 and mask.stride(3) != 1)
    ):
        return None
    place = cache.place_in(layer)
    return Step(layer, place, length, place.at(length, cos, sin, mask))


def _idle(kwargs: dict[str, Any]) -> bool:
    return all(name in _IDLE or value is None or value is False for name, value in kwargs.items())


def weights_of(attention: Any, watch: Watch) -> decode.AttentionWeights | None:
    """The weights of a layer of a known kind, or None if a part of it is not plain; `watch` sees either."""
    projections = [watch.child(attention, name) for name in _PROJECTIONS]
    norms = [watch.child(attention, name) for name in _NORMS]
    plain = all(runs(part, FastLinear) for part in projections)
    plain &= all(part is None or runs(part, FastNorm) for part in norms)
    for part in (*projections, *norms):
        if isinstance(part, nn.Module):
            watch.weights(part)
    if not plain or not watch.holds():
        return None
    q, k, v, o = ((part.weight, part.bias) for part in projections)
    q_norm, k_norm = (None if part is None else (part.weight, part.variance_epsilon) for part in norms)
    return decode.AttentionWeights(q, k, v, o, attention.head_dim, attention.scaling, q_norm, k_norm)


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
        and all((name in module._modules) == normed for name in _NORMS)
    )
