"""Where the routing of a model can be heard: our models report it, stock ones are read from outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moesaic.errors import UnsupportedModel
from moesaic.hf.model import MoesaicModel, RoutingListener
from moesaic.hf.stock_listener import Handles, StockListener


@dataclass(frozen=True)
class RoutedLayer:
    """One MoE layer as it is built.

    Attributes:
        num_experts: N.
        top_k: K.
        num_null: null experts.
        router: kind of router in our terms.
    """

    num_experts: int
    top_k: int
    num_null: int
    router: str


class RoutingSource(Protocol):
    """A model whose routing can be heard."""

    @property
    def model(self) -> PreTrainedModel:
        """The model itself, without what wraps it."""
        ...

    def layers(self) -> dict[int, RoutedLayer]:
        """Its MoE layers by decoder layer index."""
        ...

    def listen(self, listener: RoutingListener) -> RemovableHandle | Handles:
        """Call `listener` with the routing of every forward pass, until the handle is removed."""
        ...


class _OurModel:
    def __init__(self, model: MoesaicModel) -> None:
        self.model = model

    def layers(self) -> dict[int, RoutedLayer]:
        return {
            layer: RoutedLayer(
                num_experts=block.gate.num_experts,
                top_k=block.gate.top_k,
                num_null=getattr(block.gate.config, "num_null", 0),
                router=block.gate.config.type,
            )
            for layer, block in self.model.moe_blocks().items()
        }

    def listen(self, listener: RoutingListener) -> RemovableHandle | Handles:
        return self.model.add_routing_listener(listener)


class _StockModel:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._listener = StockListener(model)

    def layers(self) -> dict[int, RoutedLayer]:
        return {
            layer: RoutedLayer(
                num_experts=router.num_experts,
                top_k=router.top_k,
                num_null=getattr(router.rule, "num_null", 0),
                router=router.rule.type,
            )
            for layer, router in self._listener.routers.items()
        }

    def listen(self, listener: RoutingListener) -> RemovableHandle | Handles:
        return self._listener.listen(listener)


def routing_source(model: nn.Module) -> RoutingSource:
    """The model in `model`, which may be wrapped (PEFT, data parallelism).

    Raises:
        UnsupportedModel: if it has no MoE layer, its routing can't be heard, or it is an encoder-decoder.
    """
    ours = next((module for module in model.modules() if isinstance(module, MoesaicModel)), None)
    if ours is None:
        stock = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if stock is None:
            raise UnsupportedModel(
                f"{type(model).__name__} holds no model of moesaic or transformers, so there is no routing to record"
            )
        return _StockModel(stock)
    if not ours.moe_blocks():
        raise UnsupportedModel(f"this {type(model).__name__} has no MoE layer, so there is no routing to record")
    return _OurModel(ours)
