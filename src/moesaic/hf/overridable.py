"""Whose routing can be overridden: our models, and stock ones whose routers return picks and weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import nn
from transformers import PreTrainedModel

from moesaic.errors import UnsupportedModel, UnsupportedOverride
from moesaic.hf.model import MoesaicModel
from moesaic.hf.stock_override import StockOverrides
from moesaic.layer import OverrideFactory, Router


class Overridable(Protocol):
    """A model whose routing can be overridden."""

    @property
    def routers(self) -> Mapping[int, Router]:
        """Its routers by decoder layer index. Those of stock models say the rule and have no values."""
        ...

    @property
    def limited(self) -> frozenset[int]:
        """Layers with a capacity of their own."""
        ...

    def override_routing(self, factory: OverrideFactory, *, own_thread: bool = False) -> AbstractContextManager[None]:
        """See `MoesaicModel.override_routing`."""
        ...


@dataclass(frozen=True)
class _OurModel:
    model: MoesaicModel

    @property
    def routers(self) -> dict[int, Router]:
        return {layer: block.gate for layer, block in self.model.moe_blocks().items()}

    @property
    def limited(self) -> frozenset[int]:
        return frozenset(layer for layer, block in self.model.moe_blocks().items() if block.capacity is not None)

    def override_routing(self, factory: OverrideFactory, *, own_thread: bool = False) -> AbstractContextManager[None]:
        return self.model.override_routing(factory, own_thread=own_thread)


@dataclass(frozen=True)
class _StockModel:
    overrides: StockOverrides

    @property
    def routers(self) -> dict[int, Router]:
        return self.overrides.routers

    @property
    def limited(self) -> frozenset[int]:
        return frozenset()

    def override_routing(self, factory: OverrideFactory, *, own_thread: bool = False) -> AbstractContextManager[None]:
        return self.overrides.override_routing(factory, own_thread=own_thread)


def overridable(model: nn.Module) -> Overridable:
    """The model in `model`, which may be wrapped (PEFT, data parallelism).

    Raises:
        UnsupportedModel: if it has no MoE layer, or its routing can't be read.
        UnsupportedOverride: if picks of its tokens can't be replaced, with the reason.
    """
    ours = next((module for module in model.modules() if isinstance(module, MoesaicModel)), None)
    if ours is None:
        stock = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if stock is None:
            raise UnsupportedModel(
                f"{type(model).__name__} holds no model of moesaic or transformers: it has no MoE layer"
            )
        return _StockModel(StockOverrides(stock))
    blocks = ours.moe_blocks()
    if not blocks:
        raise UnsupportedModel(f"this {type(model).__name__} has no MoE layer whose routing could be overridden")
    for layer, block in blocks.items():
        if not block.gate.config.takes_picks:
            raise UnsupportedOverride(
                f"router {block.gate.config.type} of layer {layer} mixes tokens or merges experts, so that a token has no "
                "picks of its own to be replaced"
            )
    return _OurModel(ours)


def override_routing(
    model: nn.Module, factory: OverrideFactory, *, own_thread: bool = False
) -> AbstractContextManager[None]:
    """Change the routing of every forward pass that begins inside this block, of our models and of stock ones.

    Args:
        model: the model, or a module that holds it.
        factory: makes the override of one forward pass; see `moesaic.layer.RoutingOverride`.
        own_thread: change forward passes of this thread alone.

    Raises:
        UnsupportedModel: if it has no MoE layer, or its routing can't be read.
        UnsupportedOverride: if picks of its tokens can't be replaced, with the reason.
    """
    return overridable(model).override_routing(factory, own_thread=own_thread)
