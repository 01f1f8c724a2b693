"""The routing of a stock model's forward passes, put together from what its routers do: no class changes, no output does."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moesaic.errors import UnsupportedModel
from moesaic.hf.forward import forward_context, positions_after
from moesaic.hf.stock_routing import StockRouter, stock_routers
from moesaic.hf.threads import GONE
from moesaic.layer import RoutingContext

# Under these names callers say which tokens are of which modality.
_MODALITIES = ("mm_token_type_ids", "moe_mm_token_type_ids")


class StockListener:
    """Calls a listener with the routing of every forward pass of a stock MoE model.

    A hook before the decoder opens a `RoutingContext`, hooks on the routers commit their records to it, and a hook after
    the decoder hands it on. What layers do in the backward pass, under checkpointing, belongs to no forward pass and is
    left out. Records are made without gradient.

    Args:
        model: the model.

    Attributes:
        routers: its MoE layers by decoder layer index.
        decoder: the model that calls them.
        outer: models around that one, from the outermost.

    Raises:
        UnsupportedModel: if it is an encoder-decoder, has no MoE layer, or a router can't be read.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModel(
                f"{type(model).__name__} ({model.config.model_type}) is an encoder-decoder, in whose traces a position "
                "would mean two things; only decoders are recorded"
            )
        self.model = model
        self.routers: dict[int, StockRouter] = stock_routers(model, tables=True)
        *self.outer, self.decoder = _models_around(model, [router.block for router in self.routers.values()])

    def hearing(self, listener: Callable[[RoutingContext], None]) -> Hearing:
        """What hooks on the model have in common."""
        return Hearing(self.routers, listener)

    def listen(self, listener: Callable[[RoutingContext], None]) -> Handles:
        """Call `listener` with the routing of every forward pass from now on, until the handle is removed."""
        hearing, outer, decoder = self.hearing(listener), self.outer, self.decoder
        handles = [
            module.register_forward_pre_hook(hearing.before_outer, with_kwargs=True, prepend=True) for module in outer
        ]
        handles.append(decoder.register_forward_pre_hook(hearing.before_decoder, with_kwargs=True, prepend=True))
        for layer, router in self.routers.items():
            hook = functools.partial(hearing.after_router, layer)
            handles.append(router.gate.register_forward_hook(hook, with_kwargs=True))
        # In this order: what an outer model was given is forgotten last.
        handles.append(decoder.register_forward_hook(hearing.after_decoder, always_call=True))
        handles += [module.register_forward_hook(hearing.after_outer, always_call=True) for module in outer]
        return Handles(handles)


class Hearing(threading.local):
    """What is known of the forward pass that is under way, of each thread on its own.

    Attributes:
        open: its context; None outside of one.
    """

    def __init__(self, routers: Mapping[int, StockRouter], listener: Callable[[RoutingContext], None]) -> None:
        self._routers, self._listener = routers, listener
        self._given: dict[str, Any] = {}
        self.open: RoutingContext | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Hearing:
        return Hearing(self._routers, self._listener)

    def before_outer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any] = GONE) -> None:
        """Keep what a model around the decoder is given, which may turn ids into embeddings and masks into others."""
        if kwargs is GONE:
            return
        for name, value in named_arguments(module, args, kwargs).items():
            if isinstance(value, Tensor) and name in ("input_ids", "attention_mask", *_MODALITIES):
                self._given.setdefault(name, value)

    def after_outer(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._given = {}

    def before_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any] = GONE) -> None:
        if kwargs is GONE:
            return
        named = named_arguments(module, args, kwargs)
        ids_BS, embeddings_BSD = named.get("input_ids"), named.get("inputs_embeds")
        given = ids_BS if ids_BS is not None else embeddings_BSD
        if given is None:
            return  # the model itself says that its input is missing
        outer_ids_BS = self._given.get("input_ids")
        if ids_BS is None and outer_ids_BS is not None and outer_ids_BS.shape == given.shape[:2]:
            ids_BS = outer_ids_BS
        mask = named.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            mask = self._given.get("attention_mask", mask)
        context = forward_context(ids_BS, embeddings_BSD, _text_positions(named.get("position_ids")), mask)
        for name in _MODALITIES:
            modality_BS = named.get(name, self._given.get(name))
            if isinstance(modality_BS, Tensor) and modality_BS.shape == given.shape[:2]:
                context.modality_T = modality_BS.reshape(-1)
        context.position_T = positions_after(context, given.shape[1], mask, named.get("past_key_values"))
        self.open = context

    def after_router(
        self, layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any = GONE
    ) -> None:
        if output is GONE or self.open is None or layer in self.open.records:
            return
        x = args[0] if args else kwargs["hidden_states"]
        self.open.commit(layer, self._routers[layer].read(x.reshape(-1, x.shape[-1]), output, self.open))

    def after_decoder(self, module: nn.Module, args: tuple, output: Any) -> None:
        context, self.open = self.open, None
        if context is None or output is None:  # without output it has raised an error
            return
        if not context.records:
            raise UnsupportedModel(
                f"no router of {type(module).__name__} was heard: it was compiled before it was recorded; record a model "
                "that is not compiled"
            )
        self._listener(context)


def listeners_last(gate: nn.Module) -> None:
    """Let listeners of a router hear what hooks that were registered after them have made of its output."""
    for key, hook in list(gate._forward_hooks.items()):
        if getattr(getattr(hook, "func", None), "__func__", None) is Hearing.after_router:
            gate._forward_hooks[key] = gate._forward_hooks.pop(key)


class Handles:
    """Several handles as one."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Remove them all."""
        for handle in self._handles:
            handle.remove()


def _models_around(model: PreTrainedModel, blocks: list[nn.Module]) -> list[PreTrainedModel]:
    """The models that hold all blocks, from the outermost to the decoder itself."""
    wanted = {id(block) for block in blocks}
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [module for module in models if wanted <= {id(child) for child in module.modules()}]


def named_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    if not args:  # as in each step of `generate`, where binding them would take as long as a layer
        return kwargs
    arguments = dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)
    return {**arguments, **arguments.pop("kwargs", {})}


def _text_positions(position_ids: Tensor | None) -> Tensor | None:
    """Positions as one number a token: models of images and text have several, the first of four being that one."""
    if position_ids is None or position_ids.dim() < 3:
        return position_ids
    return position_ids[0] if position_ids.shape[0] == 4 else None
