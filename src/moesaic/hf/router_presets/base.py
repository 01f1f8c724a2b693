"""What a stock router class is to us: its rule in our fields, where its tensors are, how to call it and read it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig

from moesaic.errors import UnsupportedModel

# Tensors that our router can have.
PARAMETERS = ("weight", "bias", "scale", "per_expert_scale", "e_score_correction_bias")


class Picks(NamedTuple):
    """What a stock router decided: experts of T tokens, in no particular order, and their weights at combine."""

    index_TK: Tensor
    weight_TK: Tensor


Rule = Callable[[PreTrainedConfig], dict[str, Any]]
Reader = Callable[[nn.Module, Any], Picks]


def read_triple(block: nn.Module, output: Any) -> Picks:
    """Output of most stock routers: logits, weights, indices."""
    _, weight_TK, index_TK = output
    return Picks(index_TK, weight_TK)


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
        names: our router's tensors (keys) that the block calls otherwise than `<child>.<same name>` (values).
        child: name of the router in the block.
        argument: the selection bias of the block that it hands to the router in each call, if it does.
        batched: the router takes (B, L, D), not (T, D).
        read: the router's output as picks; the block does the part of the routing that the router leaves to it.
        block_scale: what the block multiplies the sum of its experts' outputs by, from the config.
        layers: indices of the layers with this router, where a config has several kinds; None for all.
        note: what else there is to know, although experts and weights are the same.
    """

    model_type: str
    family: str
    router: str
    block: str
    rule: Rule
    names: Mapping[str, str] = field(default_factory=dict)
    child: str = "gate"
    argument: str | None = None
    batched: bool = False
    read: Reader = read_triple
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
        found = {ours: tensors[stock] for ours, stock in self._names().items() if stock in tensors}
        if "e_score_correction_bias" in found:
            # Some families hold it as (1, N), and a model cast as a whole in lower precision.
            found["e_score_correction_bias"] = found["e_score_correction_bias"].flatten().float()
        return found

    def _names(self) -> dict[str, str]:
        names = {name: f"{self.child}.{name}" for name in PARAMETERS}
        if self.argument is not None:
            names["e_score_correction_bias"] = self.argument
        return names | dict(self.names)

    def route(self, block: nn.Module, x_TD: Tensor, config: PreTrainedConfig) -> Picks:
        """What the stock block decides for T tokens; weights include what the block multiplies its output by."""
        router = getattr(block, self.child)
        arguments = [] if self.argument is None else [getattr(block, self.argument, None)]
        picks = self.read(block, router(x_TD.unsqueeze(0) if self.batched else x_TD, *arguments))
        if self.block_scale is None:
            return picks
        return picks._replace(weight_TK=picks.weight_TK * self.block_scale(config))


def unsupported(config: PreTrainedConfig, field: str, problem: str, remedy: str) -> UnsupportedModel:
    """The error for a config field that a spec can't say."""
    return UnsupportedModel(f"{config.model_type}: {field} = {getattr(config, field)!r} {problem}; {remedy}")
