"""What a stock router class is to us: its rule in our fields, where its tensors are, how to call it and read it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from moesaic.errors import UnsupportedModel
from moesaic.layer import RoutingContext

# Tensors that our router can have.
PARAMETERS = ("weight", "bias", "scale", "per_expert_scale", "e_score_correction_bias", "tid2eid")


class Picks(NamedTuple):
    """What a stock router decided: experts of T tokens, in no particular order, and their weights at combine."""

    index_TK: Tensor
    weight_TK: Tensor


Rule = Callable[[PreTrainedConfig], dict[str, Any]]
Call = Callable[[nn.Module, Tensor, RoutingContext], Picks]


@dataclass(frozen=True)
class RouterPreset:
    """One stock router class.

    "Block" is the stock module that owns the router and calls it; names of tensors start there.

    Attributes:
        model_type: of the config that the block is made of.
        family: folder in `transformers.models`.
        router: name of the router class.
        block: name of the block's class.
        rule: that config as fields of our router config.
        names: our router's tensors (keys) that the block calls otherwise than `<child>.<same name>` (values); several
            names stand for tensors that are joined.
        child: name of the router in the block.
        argument: the selection bias of the block that it hands to the router in each call, if it does.
        call: how the block calls the router and reads its output, if not as most do: a call with (T, D), and logits,
            weights and indices as result.
        block_scale: what the block multiplies the sum of its experts' outputs by, from the config.
        layers: indices of the layers with this router, where a config has several kinds; None for all.
        note: what else there is to know, although experts and weights are the same.
    """

    model_type: str
    family: str
    router: str
    block: str
    rule: Rule
    names: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    child: str = "gate"
    argument: str | None = None
    call: Call | None = None
    block_scale: Callable[[PreTrainedConfig], float] | None = None
    layers: Callable[[PreTrainedConfig], Iterable[int]] | None = None
    note: str = ""

    @property
    def router_class(self) -> type[nn.Module]:
        """The stock class; imports its module."""
        return getattr(self._module, self.router)

    @property
    def block_class(self) -> type[nn.Module]:
        """The stock block's class; imports its module."""
        return getattr(self._module, self.block)

    @property
    def _module(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.family}.modeling_{self.family}")

    def weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of our router.

        Args:
            tensors: the state dict of the stock block, or its gradients under the same names.
        """
        found = {}
        for ours, stock in self._names().items():
            parts = [tensors[name] for name in stock if name in tensors]
            if parts and ours == "e_score_correction_bias":
                # Some families hold it as (1, N), and a model cast as a whole in lower precision.
                parts = [part.flatten().float() for part in parts]
            if parts:
                found[ours] = torch.cat(parts)
        return found

    def selection_bias(self, block: nn.Module) -> Tensor | None:
        """The tensor of a block that is our `e_score_correction_bias`, of any shape; None if it has none."""
        (name, *more) = self._names()["e_score_correction_bias"]
        if more:
            return None
        found: Any = block
        for part in name.split("."):
            found = getattr(found, part, None)
        return found if isinstance(found, Tensor) else None

    def _names(self) -> dict[str, tuple[str, ...]]:
        names: dict[str, str | tuple[str, ...]] = {name: f"{self.child}.{name}" for name in PARAMETERS}
        if self.argument is not None:
            names["e_score_correction_bias"] = self.argument
        return {ours: (stock,) if isinstance(stock, str) else stock for ours, stock in {**names, **self.names}.items()}

    def route(
        self, block: nn.Module, x_TD: Tensor, config: PreTrainedConfig, context: RoutingContext | None = None
    ) -> Picks:
        """What the stock block decides for T tokens; weights include what the block multiplies its output by.

        Args:
            block: an instance of `block_class`.
            x_TD: hidden states.
            config: what the block was made of.
            context: token ids and modalities, for the routers that read them.
        """
        if self.call is not None:
            picks = self.call(block, x_TD, context or RoutingContext())
        else:
            arguments = [] if self.argument is None else [getattr(block, self.argument, None)]
            _, weight_TK, index_TK = getattr(block, self.child)(x_TD, *arguments)
            picks = Picks(index_TK, weight_TK)
        if self.block_scale is None:
            return picks
        return picks._replace(weight_TK=picks.weight_TK * self.block_scale(config))


def unsupported(config: PreTrainedConfig, field: str, problem: str, remedy: str) -> UnsupportedModel:
    """The error for a config field that a spec can't say."""
    return UnsupportedModel(f"{config.model_type}: {field} = {getattr(config, field)!r} {problem}; {remedy}")
