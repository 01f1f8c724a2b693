"""Noticing that what a plan was made of has changed: children, weights, or hooks that a native call would not run.

Hooks of routing overrides do not count: decoder layers take the overrides from their keywords themselves.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from moesaic.hf.stock_override import OverrideHook


class Watch:
    """Children, weights and hooks of some modules, as they were when they were added."""

    def __init__(self) -> None:
        self._children: list[tuple[dict[str, Any], str, nn.Module | None]] = []
        self._weights: list[tuple[dict[str, Any], str, Tensor, int]] = []
        self._hooks: list[tuple[dict[int, Any], int]] = []

    def child(self, parent: nn.Module, name: str, *, hooks: int = 0) -> Any:
        """Add a child, None if there is none. It may have so many hooks, which the caller has understood."""
        found = parent._modules.get(name)
        self._children.append((parent._modules, name, found))
        if found is not None:
            self._hooks.append((found._forward_pre_hooks, hooks))
            self._hooks.append((found._forward_hooks, 0))
        return found

    def weights(self, module: nn.Module) -> None:
        """Add a module's own parameters."""
        for name, weight in module._parameters.items():
            if weight is not None:
                self._weights.append((module._parameters, name, weight, weight.data_ptr()))

    def holds(self) -> bool:
        """Whether all is as it was, and nothing else is hooked."""
        for children, name, child in self._children:
            if children.get(name) is not child:
                return False
        for parameters, name, weight, address in self._weights:
            if parameters.get(name) is not weight or weight.data_ptr() != address:
                return False
        for hooks, count in self._hooks:
            if len(hooks) != count and sum(not isinstance(hook, OverrideHook) for hook in hooks.values()) != count:
                return False
        return not hooks_of_all._global_forward_hooks and not hooks_of_all._global_forward_pre_hooks
