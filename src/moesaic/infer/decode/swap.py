"""Giving one module another forward and taking it back: its class becomes a subclass with the same name.

Parameters, buffers, children, hooks and state dict keys stay what they are, and so does everything that asks for the
class by name or with isinstance. Copies and pickles of a swapped module are plain modules.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, cast

from torch import nn

# Where a swapped module keeps its plan.
PLAN = "_native_plan"


class Fast:
    """Mixin before a stock class; `_plain` is that class."""

    _plain: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The first protocol names the class in an argument; later ones insist on that of the object.
        function, arguments, state, *rest = cast(tuple, super().__reduce_ex__(1))
        state = {name: value for name, value in state.items() if name != PLAN}
        return function, (self._plain, *arguments[1:]), state, *rest


@functools.cache
def _fast_class(plain: type[nn.Module], mixin: type[Fast]) -> type[nn.Module]:
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (mixin, plain), {**names, "_plain": plain})


def swap(module: nn.Module, mixin: type[Fast]) -> None:
    """Run the mixin's forward on `module` from now on."""
    module.__class__ = _fast_class(type(module), mixin)
    module.__dict__[PLAN] = None


def runs(module: object, mixin: type[Fast]) -> bool:
    """Whether a module runs the forward of a mixin."""
    return isinstance(module, mixin)


def undo(module: nn.Module) -> None:
    """As it was; a module whose class somebody else has changed since is left alone."""
    kind = type(module)
    if issubclass(kind, Fast) and kind is _fast_class(kind._plain, _mixin_of(kind)):
        module.__class__ = kind._plain
        module.__dict__.pop(PLAN, None)


def _mixin_of(kind: type[Fast]) -> type[Fast]:
    return cast(type[Fast], kind.__bases__[0])
