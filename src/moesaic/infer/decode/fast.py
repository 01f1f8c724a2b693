"""`fast_decoding`: a model's own modules, computed natively while it generates on CPU."""

from __future__ import annotations

import logging
from collections import Counter
from types import TracebackType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moesaic.hf.experts import IMPLEMENTATION
from moesaic.infer.decode import attention, layer, linear, norm, router, swap
from moesaic.infer.decode.attention import FastAttention
from moesaic.infer.decode.layer import FastLayer
from moesaic.infer.decode.linear import FastLinear
from moesaic.infer.decode.norm import FastNorm
from moesaic.infer.decode.router import FastSoftmaxRouter, FastTopKRouter
from moesaic.infer.decode.swap import Fast
from moesaic.layer.kernels.native import decode

logger = logging.getLogger(__name__)


# What a mixin's modules are called in the log.
_KINDS: dict[type[Fast], str] = {
    FastLinear: "linear maps",
    FastNorm: "norms",
    FastAttention: "attention layers",
    FastLayer: "decoder layers",
    FastTopKRouter: "routers",
    FastSoftmaxRouter: "routers",
}


class FastDecoding:
    """What `fast_decoding` did to a model; as a context manager it undoes that at its end.

    Attributes:
        counts: how many modules compute natively, by kind.
    """

    def __init__(self, model: nn.Module) -> None:
        self.counts: Counter[str] = Counter()
        self._modules: list[nn.Module] = []
        self._experts: list[tuple[Any, str]] = []
        if not decode.available():
            return  # the library has said why
        for module in list(model.modules()):
            mixin = _mixin_for(module)
            if mixin is not None:
                swap.swap(module, mixin)
                self._modules.append(module)
                self.counts[_KINDS[mixin]] += 1
        if self._modules:
            self._switch_experts(model)
        done = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        logger.info("fast decoding: %s compute natively", done or "no modules")

    def _switch_experts(self, model: nn.Module) -> None:
        if any(getattr(module, "has_post_expert_norm", False) for module in model.modules()):
            return  # no kernel of ours computes these
        for part in model.modules():
            if not isinstance(part, PreTrainedModel) or not part._can_set_experts_implementation():
                continue
            name = getattr(part.config, "_experts_implementation", None)
            if name not in (None, IMPLEMENTATION):
                self._experts.append((part.config, name))
                part.config._experts_implementation = IMPLEMENTATION

    def undo(self) -> None:
        """Leave the model as it was; what somebody else has changed since stays changed."""
        for module in self._modules:
            swap.undo(module)
        for config, name in self._experts:
            if config._experts_implementation == IMPLEMENTATION:
                config._experts_implementation = name
        self._modules, self._experts = [], []

    def __enter__(self) -> FastDecoding:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def fast_decoding(model: nn.Module) -> FastDecoding:
    """Let a model on CPU compute natively what a decoding step consists of: ours, or any of transformers.

    Plain linear maps, RMSNorms, rotary attention over a growing cache, top-k routers and packed experts then take one
    native call each when they get few tokens (at most 16) and no gradient is asked for. Everything else, training, long
    prompts, compiled graphs and modules that this does not know among it, runs as before. Weights stay where they are
    and state dict keys what they are, so adapters, `save_pretrained` and `load_state_dict` work as ever.

        with moesaic.fast_decoding(model):
            model.generate(...)

    Results equal those of the plain modules within the rounding of their dtype. Without the native library (no C
    compiler when moesaic was installed) nothing is changed and a warning says so once.

    Args:
        model: any module; call it again after replacing parts of it.

    Returns:
        A handle: `undo()` takes it back, as does the end of a `with` block.
    """
    return FastDecoding(model)


def _mixin_for(module: nn.Module) -> type[Fast] | None:
    if isinstance(module, Fast):
        return None
    if linear.knows(module):
        return FastLinear
    if norm.knows(module):
        return FastNorm
    if attention.knows(module):
        return FastAttention
    if layer.knows(module):
        return FastLayer
    return router.mixin_for(module)
