"""`fast_decoding`: a model's own modules, computed natively while it generates on CPU."""

from __future__ import annotations

import logging
from collections import Counter
from types import TracebackType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moesaic.hf.experts import IMPLEMENTATION
from moesaic.infer.decode import attention, linear, norm, router, swap
from moesaic.infer.decode.attention import FastAttention
from moesaic.infer.decode.linear import FastLinear
from moesaic.infer.decode.norm import FastNorm
from moesaic.infer.decode.swap import Fast
from moesaic.layer.kernels.native import decode

logger = logging.getLogger(__name__)


class FastDecoding:
    """What `fast_decoding` did to a model; also a context manager that undoes it at its end.

    Attributes:
        counts: modules that compute natively, by kind.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[nn.Module] = []
        self._experts: list[tuple[Any, str]] = []
        self.counts: Counter[str] = Counter()
        if not decode.available():
            return  # the library has said why
        for module in model.modules():
            mixin = _mixin_for(module)
            if mixin is not None:
                swap.swap(module, mixin)
                self._modules.append(module)
                self.counts[mixin.__name__] += 1
        self._switch_experts(model)
        logger.info("fast decoding: %s", ", ".join(f"{n} {kind}" for kind, n in self.counts.items()) or "nothing to do")

    def _switch_experts(self, model: nn.Module) -> None:
        for part in model.modules():
            if not isinstance(part, PreTrainedModel):
                continue
            name = getattr(part.config, "_experts_implementation", None)
            if part._can_set_experts_implementation() and name not in (None, IMPLEMENTATION):
                self._experts.append((part.config, name))
                part.config._experts_implementation = IMPLEMENTATION

    def undo(self) -> None:
        """The model as it was."""
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


def _mixin_for(module: nn.Module) -> type[Fast] | None:
    if isinstance(module, Fast):
        return None
    if linear.knows(module):
        return FastLinear
    if norm.knows(module):
        return FastNorm
    if attention.knows(module):
        return FastAttention
    return router.mixin_for(module)


def fast_decoding(model: nn.Module) -> FastDecoding:
    return FastDecoding(model)
