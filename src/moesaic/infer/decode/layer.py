"""A decoder layer for one new token of each sequence: two native calls where all parts of it are plain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.hf.backbone import BackboneMoEBlock, take_context
from moesaic.hf.stock_override import take_carried
from moesaic.infer.decode import attention, block, source
from moesaic.infer.decode.attention import FastAttention, step_of, weights_of
from moesaic.infer.decode.norm import FastNorm
from moesaic.infer.decode.swap import PLAN, Fast, runs
from moesaic.infer.decode.watch import Watch
from moesaic.layer.kernels.native import decode


@dataclass(frozen=True)
class _Planned:
    """The first half, or None where there can't be one, as long as `watch` holds; and the second under its own watch."""

    watch: Watch
    first: decode.AttentionHalfPlan | None
    second_watch: Watch
    second: block.FastBlock | None
    ours: BackboneMoEBlock | None


class FastLayer(Fast):
    """A decoder layer with norms before attention and feed-forward network, as most families have it.

    Norms, attention and residual take one call, router and experts another; a feed-forward network of another kind
    runs as it is.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = None
        if not args and not torch.compiler.is_compiling():
            y = self._step(hidden_states, **kwargs)
        if y is None:
            return self._plain.forward(self, hidden_states, *args, **kwargs)  # type: ignore[arg-type]
        return y

    def _step(
        self,
        x_B1D: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """The output (B, 1, D), or None if this call is no such step."""
        own: Any = self
        if x_B1D.shape[1] != 1 or torch.is_grad_enabled():
            return None
        held: _Planned | None = own.__dict__[PLAN]
        if held is None or not held.watch.holds() or not held.second_watch.holds():
            held = _planned(own)
            # With a hook in the way there is no plan, and nothing that would tell when it goes.
            own.__dict__[PLAN] = held if held.watch.holds() and held.second_watch.holds() else None
        if held.first is None or not x_B1D.is_contiguous():
            return None
        context, carried = take_context(kwargs), take_carried(kwargs)
        step = step_of(own.self_attn, x_B1D, position_embeddings, attention_mask, past_key_values, kwargs)
        if step is None:
            return None
        sum_B1D, y_B1D = held.first(x_B1D, step.address)
        step.done()
        if held.second is not None and held.second.takes(y_B1D):
            asked = held.second.asked(context, carried)
            if asked is not None:
                return held.second(y_B1D, sum_B1D, context, asked)
        if held.ours is not None:
            held.ours.context = context
        for each in carried:
            each.arrive(own.self_attn.layer_idx)
        return sum_B1D + own.mlp(y_B1D)


def _planned(layer: Any) -> _Planned:
    watch, second_watch = Watch(), Watch()
    feed_forward = second_watch.child(layer, "mlp")
    ours = feed_forward if isinstance(feed_forward, BackboneMoEBlock) else None
    self_attn = layer.self_attn
    # The hook that takes the routing context to our block; here the block is given it.
    carries = ours is not None and list(self_attn._forward_pre_hooks.values()) == [ours.receive_context]
    watch.child(layer, "self_attn", hooks=int(carries))
    before, after = watch.child(layer, "input_layernorm"), watch.child(layer, "post_attention_layernorm")
    weights = weights_of(self_attn, watch) if runs(self_attn, FastAttention) else None
    first = None
    if weights is not None and runs(before, FastNorm) and runs(after, FastNorm):
        watch.weights(before)
        watch.weights(after)
        pairs = [(norm.weight, norm.variance_epsilon) for norm in (before, after)]
        if watch.holds() and all(weight.dtype is weights.o[0].dtype for weight, _ in pairs):
            first = decode.AttentionHalfPlan(pairs[0], weights, pairs[1])
    second = block.plan_of(feed_forward, second_watch) if first is not None else None
    return _Planned(watch, first, second_watch, second, ours)


def knows(module: nn.Module) -> bool:
    """Whether a module's code is that of Llama's decoder layer, and its attention's is known."""
    if not source.says(type(module).forward, *source.DECODER_LAYERS):
        return False
    return any(name == "self_attn" and attention.knows(child) for name, child in module.named_children())
