"""Router and experts of a block for a few tokens, as the second half of a decoder layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from moesaic.hf.backbone import BackboneMoEBlock
from moesaic.hf.experts import IMPLEMENTATION, kernel_of
from moesaic.hf.stock_override import Carried, RouterHook
from moesaic.infer.decode import source
from moesaic.infer.decode.router import FastSoftmaxRouter, FastTopKRouter, record_of, rule_of
from moesaic.infer.decode.swap import runs
from moesaic.infer.decode.watch import Watch
from moesaic.layer import RoutingContext
from moesaic.layer.asked import OWN, Asked, asked_of
from moesaic.layer.kernels import VARIABLE, ExpertWeights
from moesaic.layer.kernels.native import decode


class FastBlock:
    """What a block computes for normalised tokens, in one native call; `watch` sees whether it still does.

    Args:
        block: one that `plan_of` knows.
        weights: of its experts.
        watch: what its plan is made of.
    """

    def __init__(self, block: Any, weights: ExpertWeights, watch: Watch) -> None:
        self._block, self._weights, self.watch = block, weights, watch
        gate = block.gate
        self._plan = decode.MoEHalfPlan(gate.weight, getattr(gate, "bias", None), rule_of(gate), weights)
        self._is_ours = isinstance(block, BackboneMoEBlock)
        self._native: dict[tuple[int, str | None, str], bool] = {}

    def takes(self, x_B1D: Tensor) -> bool:
        """Whether the experts are to be computed by the native kernel, which the environment and configs may say."""
        experts = self._block.experts
        if experts.config._experts_implementation not in self._implementations:
            return False
        if self._block.training and getattr(self._block, "jitter_noise", 0):
            return False
        key = (x_B1D.shape[0], os.environ.get(VARIABLE), vars(experts).get("kernel", "auto"))
        found = self._native.get(key)
        if found is None:
            x_TD = x_B1D.reshape(-1, x_B1D.shape[-1])
            found = self._native[key] = kernel_of(experts, self._weights, x_TD, self._block.gate.top_k) == "native"
        return found

    @property
    def _implementations(self) -> tuple[str, ...]:
        # Our experts run the same kernels under "eager".
        return (IMPLEMENTATION, "eager") if self._is_ours else (IMPLEMENTATION,)

    def asked(self, context: RoutingContext | None, carried: Sequence[Carried]) -> Asked | None:
        """The picks that overrides ask for; None if one must be called to tell, or several act.

        Args:
            context: of the forward pass, for our blocks.
            carried: contexts of a stock model's overrides.
        """
        gate = self._block.gate
        if self._is_ours:
            if context is None or context.override is None:
                return OWN
            return asked_of(context.override, self._block.layer, gate.weight.shape[0], gate.top_k)
        if not gate._forward_hooks:
            return OWN
        hooks = [hook for hook in gate._forward_hooks.values() if isinstance(hook, RouterHook)]
        if len(carried) > 1 or not all(hook.travels for hook in hooks):
            return None
        if not carried:
            return OWN
        return asked_of(carried[0].context.override, hooks[0].layer, gate.weight.shape[0], gate.top_k)

    def __call__(self, x_B1D: Tensor, residual: Tensor, context: RoutingContext | None, asked: Asked = OWN) -> Tensor:
        """residual + block(x), whose routing is committed to `context` if there is one."""
        block, pick_TK = self._block, asked.pick_TK
        # Those placed after the layer belong to a hook of it, which runs in any case.
        shared = self._is_ours and block.shared_experts is not None and block.shared_norm is None
        y_B1D, picks = self._plan(x_B1D, None if shared else residual, pick_TK)
        if context is not None:
            context.commit(block.layer, record_of(picks, overridden=pick_TK is not None))
        if shared:
            y_B1D = residual + (y_B1D + block._shared(x_B1D, None))
        return y_B1D


def plan_of(block: nn.Module, watch: Watch) -> FastBlock | None:
    """The plan of a block, or None if a part of it is not plain; `watch` sees either."""
    ours = type(block) is BackboneMoEBlock
    gate, experts = watch.child(block, "gate"), watch.child(block, "experts")
    for part in (gate, experts):
        if isinstance(part, nn.Module):
            watch.weights(part)
    if ours:
        plain = block.capacity is None and block.depth is None and block.dropout is None and not block.returns_tuple
    else:
        plain = source.says(type(block).forward, *source.SPARSE_BLOCKS)
    if not plain or not runs(gate, FastTopKRouter if ours else FastSoftmaxRouter) or not watch.holds():
        return None
    if not hasattr(experts, "is_transposed") or getattr(experts, "has_post_expert_norm", False):
        return None
    weights = ExpertWeights.of(experts)
    parts = (weights.up_NHD, weights.down_NDF, weights.up_bias_NH, weights.down_bias_ND)
    if weights.fused is None or any(part is not None and not _plain(part, gate.weight) for part in parts):
        return None
    return FastBlock(block, weights, watch)


def _plain(part: Tensor, like: Tensor) -> bool:
    kind = type(part) in (Tensor, nn.Parameter)
    return kind and part.is_cpu and part.dtype is like.dtype and part.stride(-1) == 1
