"""Overriding the routing of a stock model, from outside: hooks replace what its routers return."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moesaic.errors import UnsupportedOverride
from moesaic.hf.forward import num_tokens
from moesaic.hf.stock_listener import Hearing, StockListener, listeners_last, named_arguments
from moesaic.hf.stock_routing import StockRouter
from moesaic.hf.threads import GONE, Entered, entered_now, for_this_thread
from moesaic.layer import OverrideFactory, Router, RoutingContext, override_of


class StockOverrides:
    """The routers of a stock model, whose picks and weights can be replaced.

    Args:
        model: the model.

    Raises:
        UnsupportedModel: if its routing can't be heard; see `StockListener`.
        UnsupportedOverride: if a router's output is no list of picks and weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._listener = StockListener(model)
        for router in self._listener.routers.values():
            reason = router.irreplaceable
            if reason is not None:
                raise UnsupportedOverride(
                    f"{router.preset.model_type}: {reason}, so that its picks can't be replaced from outside; "
                    "moesaic.convert(model) makes a model whose picks can, if it knows the family"
                )

    @property
    def routers(self) -> dict[int, Router]:
        """Our routers with the rules of the stock ones, by decoder layer index; without values."""
        return {layer: router.router for layer, router in self._listener.routers.items()}

    @contextlib.contextmanager
    def override_routing(self, factory: OverrideFactory, *, own_thread: bool = False) -> Iterator[None]:
        """As `MoesaicModel.override_routing`."""
        overriding = _Overriding(self._listener, factory, own_thread=own_thread)
        try:
            yield
        finally:
            overriding.close()


class _Here(threading.local):
    """The contexts that have arrived in layers, of each thread on its own."""

    def __init__(self) -> None:
        self.layers: dict[int, Carried] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Here:
        return _Here()


class Carried:
    """A context on its way through the keywords of a decoder and its layers."""

    def __init__(self, context: RoutingContext, here: _Here) -> None:
        self.context, self._here = context, here

    def arrive(self, layer: int) -> None:
        """Wait for the router of a layer, as the context does when it is taken out of the keywords of the layer's parts."""
        self._here.layers[layer] = self


def take_carried(kwargs: dict[str, Any]) -> list[Carried]:
    """The contexts that are carried in the keywords of a call, taken out of them: for who stands for all parts of a layer."""
    names = [name for name, value in kwargs.items() if isinstance(value, Carried)]
    return [kwargs.pop(name) for name in names]


class OverrideHook:
    """A hook of an override on a part of a decoder layer.

    Who computes the layer without calling its parts must take the contexts out of its keywords, and do what they say.
    """


@dataclass(frozen=True)
class _BeforePart(OverrideHook):
    """Takes the context out of the keywords of a part; its router is in this layer, if there is one."""

    name: str
    here: _Here
    layer: int | None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any] = GONE) -> Any:
        carried = None if kwargs is GONE else kwargs.get(self.name)
        if carried is None:
            return None
        if self.layer is not None:
            carried.arrive(self.layer)
        return args, {name: value for name, value in kwargs.items() if name != self.name}


@dataclass(frozen=True)
class RouterHook(OverrideHook):
    """Replaces what a router returns.

    Attributes:
        layer: index of the decoder layer.
        travels: whether contexts come by keyword.
    """

    layer: int
    travels: bool
    here: _Here
    hearing: Hearing
    router: StockRouter

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any = GONE) -> Any:
        if output is GONE:
            return None
        carried = self.here.layers.pop(self.layer, None)
        context = carried.context if carried is not None else None
        if context is None and not self.travels:
            context = self.hearing.open
        if context is None or context.override is None:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        return self.router.overridden(x.reshape(-1, x.shape[-1]), output, context)


class _Overriding:
    """The hooks of one override.

    The context of a forward pass travels as a keyword to the layers and to their children, where it is taken out. So layers
    that are recomputed in the backward pass get that of their forward pass, for which the hooks of layers outlive the block
    until no context is left. Families that pass no keywords on get the context that is under way, and are refused if layers
    are recomputed.
    """

    def __init__(self, listener: StockListener, factory: OverrideFactory, *, own_thread: bool) -> None:
        self._factory, self._hearing = factory, listener.hearing(lambda context: None)
        self._name = f"routing_override_{id(self)}"
        self._entered, self._here = entered_now(self, _entered(listener.decoder), own_thread=own_thread), _Here()
        self._live: set[int] = set()
        self._numbers, self._closed = itertools.count(), False
        self._decoder = listener.decoder
        layers = {layer: _decoder_layer(listener.decoder, router) for layer, router in listener.routers.items()}
        stacks = [*{id(stack): stack for stack, _ in layers.values()}.values()]
        every = [module for stack in stacks for module in stack]
        self._travels = all(_takes_keywords(module) for module in (listener.decoder, *every))
        handles = [
            module.register_forward_pre_hook(self._hearing.before_outer, with_kwargs=True, prepend=True)
            for module in listener.outer
        ]
        handles.append(listener.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True, prepend=True))
        handles.append(listener.decoder.register_forward_hook(self._after_decoder, always_call=True))
        handles += [
            module.register_forward_hook(self._hearing.after_outer, always_call=True) for module in listener.outer
        ]
        self._handles: list[RemovableHandle] = handles
        numbers = {id(module): layer for layer, (_, module) in layers.items()}
        self._inner = [
            child.register_forward_pre_hook(
                _BeforePart(self._name, self._here, numbers.get(id(module))), with_kwargs=True, prepend=True
            )
            for module in every
            for child in module.children()
        ]
        for layer, router in listener.routers.items():
            hook = RouterHook(layer, self._travels, self._here, self._hearing, router)
            self._inner.append(router.gate.register_forward_hook(hook, with_kwargs=True))
            listeners_last(router.gate)

    def close(self) -> None:
        """Change no further forward pass."""
        self._closed = True
        self._hearing.open = None
        for handle in self._handles:
            handle.remove()
        self._remove_if_done()

    def _ended(self, number: int) -> None:
        self._live.discard(number)
        self._remove_if_done()

    def _remove_if_done(self) -> None:
        if self._closed and not self._live:
            for handle in self._inner:
                handle.remove()

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any] = GONE) -> Any:
        if kwargs is GONE or self not in for_this_thread(_entered(module)):
            return None
        self._hearing.before_decoder(module, args, kwargs)
        context = self._hearing.open
        if context is None:
            return None
        named = named_arguments(module, args, kwargs)
        tokens = num_tokens(named.get("input_ids"), named.get("inputs_embeds"))
        context.override = override_of([self._factory], context, tokens)
        if context.override is None:
            return None
        if not self._travels:
            if module.training and getattr(module, "is_gradient_checkpointing", False):
                raise UnsupportedOverride(
                    f"{type(module).__name__} passes no keywords on to its layers, so that layers which are recomputed would "
                    "not know which forward pass they belong to; switch gradient checkpointing off"
                )
            return None
        carried = Carried(context, self._here)
        # An id may be that of a context which is gone; a number of its own never is.
        self._live.add(number := next(self._numbers))
        weakref.finalize(carried, self._ended, number)
        return args, {**kwargs, self._name: carried}

    def _after_decoder(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._hearing.open = None
        self._here.layers.clear()


def _entered(decoder: nn.Module) -> list[Entered[_Overriding]]:
    """What overrides a model now, in the order in which it was entered."""
    active = [getattr(hook, "__self__", None) for hook in decoder._forward_pre_hooks.values()]
    # The hook of a later one stands before those of earlier ones.
    return [other._entered for other in reversed(active) if isinstance(other, _Overriding)]


def _decoder_layer(decoder: nn.Module, router: StockRouter) -> tuple[nn.ModuleList, nn.Module]:
    """The decoder layer that holds a router's block, and the list in which it stands."""
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                if any(child is router.block for child in layer.modules()):
                    return module, layer
    raise UnsupportedOverride(f"{type(decoder).__name__} does not keep its layers in a list")


def _takes_keywords(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
