"""The routing of a stock transformers MoE model as our records, read from outside while the model runs.

Each router gets a forward hook that routes the same input by our rule for that router class (`router_presets`), with
the stock router's own parameters. So every family gives the same record, attached to the model's autograd graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.errors import UnsupportedModel
from moesaic.hf.router_presets import ROUTER_PRESETS, RouterPreset, presets_of, rule_of
from moesaic.layer import (
    MoEBlock,
    NullExpertsConfig,
    Router,
    RouterConfig,
    Routing,
    RoutingContext,
    TopKConfig,
)
from moesaic.layer.capacity import drop_picks
from moesaic.layer.override import served
from moesaic.layer.routers.scores import score


class Replaced(tuple):
    """What a stock router returns in the place of its own logits, weights and indices, for hooks that come after."""


# Called with the layer and its routing in the place of the block's output, and returns what to put there.
OnOutput = Callable[[int, Tensor], Tensor]


@dataclass
class StockRouter:
    """One MoE layer of a stock model.

    Attributes:
        layer: index of the decoder layer.
        block: the stock module that owns the router.
        preset: what its router class is to us.
        config: what the block was made of.
        rule: our router config with the same picks and weights.
        num_experts: N.
    """

    layer: int
    block: nn.Module
    preset: RouterPreset
    config: PreTrainedConfig
    rule: RouterConfig
    num_experts: int

    def __post_init__(self) -> None:
        hidden_size = self.tensors()["weight"].shape[1]
        with torch.device("meta"):  # it computes with the stock router's tensors only
            self._router = self.rule.build(hidden_size, self.num_experts).eval()
        self._router.layer = self.layer

    @property
    def gate(self) -> nn.Module:
        """The stock router."""
        return cast(nn.Module, getattr(self.block, self.preset.child))

    @property
    def selection_bias(self) -> Tensor | None:
        """The stock router's own selection bias, of any shape; None if it has none."""
        return self.preset.selection_bias(self.block)

    def tensors(self) -> dict[str, Tensor]:
        """The stock router's tensors under our names, attached to the graph."""
        named = (*self.block.named_parameters(), *self.block.named_buffers())
        return self.preset.weights({name: tensor for name, tensor in named if ".experts." not in f".{name}"})

    @property
    def top_k(self) -> int:
        """K."""
        return self._router.top_k

    def routing(self, x_TD: Tensor, output: Any, context: RoutingContext | None = None) -> Routing:
        """The record of the stock router for `x_TD`, given what it returned.

        Args:
            x_TD: its input.
            output: what it returned.
            context: of the forward pass, for routers that look token ids up.
        """
        return self._as_made(functional_call(self._router, self.tensors(), (x_TD, context)), output)

    @property
    def router(self) -> Router:
        """Our router with the same rule, without values."""
        return self._router

    @property
    def irreplaceable(self) -> str | None:
        """Why `overridden` does not work for this family, or None if it does."""
        if self.preset.call is not None:
            return f"{self.preset.router} does not return logits, weights and indices of tokens"
        if not isinstance(self.rule, TopKConfig):
            return f"{self.preset.router} picks null experts, whose weights a routing of ours adds up"
        return None

    def overridden(self, x_TD: Tensor, output: Any, context: RoutingContext) -> tuple[Tensor, Tensor, Tensor]:
        """What the stock router is to return in place of `output`, by the override of `context`."""
        overridden = _Overridden(self)
        tensors = {f"router.{name}": tensor for name, tensor in self.tensors().items()}
        routing: Routing | None = functional_call(overridden, tensors, (x_TD, output, context))
        if routing is None:
            return output
        logits, weight_TK, index_TK = output
        # Stock experts can't skip: those of nothing are computed, with weight 0.
        none_TK = routing.index_TK >= self.num_experts
        new_TK = routing.weight_TK.masked_fill(none_TK, 0.0)
        if self.preset.block_scale is not None:
            new_TK = new_TK / self.preset.block_scale(self.config)
        shape = (*index_TK.shape[:-1], routing.top_k)
        picks_TK = served(routing.index_TK, self.num_experts)
        return Replaced((logits, new_TK.to(weight_TK.dtype).reshape(shape), picks_TK.to(index_TK.dtype).reshape(shape)))

    def _as_made(self, routing: Routing, output: Any) -> Routing:
        if self.preset.call is not None or not isinstance(self.rule, TopKConfig):
            return routing
        # The picks that were made: in low precision the stock router may round otherwise than ours.
        index_TK, weight_TK = self._picks(output, routing.weight_TK.dtype)
        changed = isinstance(output, Replaced)
        return replace(routing, index_TK=index_TK, weight_TK=weight_TK, overridden=changed)

    @torch.no_grad()
    def read(self, x_TD: Tensor, output: Any, context: RoutingContext | None = None) -> Routing:
        """As `routing`, without gradient, and where the router returns its logits without computing them again.

        Then `selection_TN` is not masked outside a token's groups: among its picks the order is the same.
        """
        rule = self.rule
        if self.preset.call is not None or not isinstance(rule, TopKConfig) or rule.expert_scale:
            return self.routing(x_TD, output, context)
        index_TK, weight_TK = self._picks(output, torch.float32)
        logits_TN = output[0].reshape(len(index_TK), -1).float()
        scores_TN = score(logits_TN, rule.score_function)
        selection_TN = logits_TN if rule.select_by == "logits" else scores_TN
        if rule.selection_bias and self.selection_bias is not None:
            selection_TN = selection_TN + self.selection_bias.flatten()
        return Routing(index_TK, weight_TK, logits_TN, scores_TN, selection_TN)

    def _picks(self, output: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Experts and weights that most router classes return."""
        _, weight_TK, index_TK = output
        index_TK = index_TK.reshape(-1, index_TK.shape[-1]).long()
        weight_TK = weight_TK.reshape(index_TK.shape).to(dtype)
        if self.preset.block_scale is not None:
            weight_TK = weight_TK * self.preset.block_scale(self.config)
        return index_TK, weight_TK

    def listen(self, on_routing: Callable[[Tensor, Any], None], on_output: OnOutput) -> list[RemovableHandle]:
        """Call `on_routing` with input (T, D) and output of the router, and `on_output` with the block's output."""

        def after_router(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            on_routing(x.reshape(-1, x.shape[-1]), output)

        def after_block(module: nn.Module, args: tuple, output: Any) -> Any:
            if isinstance(output, tuple):
                return (on_output(self.layer, output[0]), *output[1:])
            return on_output(self.layer, output)

        return [
            self.gate.register_forward_hook(after_router, with_kwargs=True),
            self.block.register_forward_hook(after_block),
        ]


class _Overridden(nn.Module):
    """A router and what an override makes of its routing, in one call, so that both see the stock router's tensors."""

    def __init__(self, stock: StockRouter) -> None:
        super().__init__()
        self.router, self._stock = stock._router, (stock,)

    def forward(self, x_TD: Tensor, output: Any, context: RoutingContext) -> Routing | None:
        """The routing to use, or None to leave what the router made."""
        (stock,), override = self._stock, context.override
        made = stock._as_made(self.router(x_TD, context), output)
        if override is None:
            return None
        routing = override(stock.layer, self.router, made, context)
        if routing is made:
            return None
        return routing if routing.dropped_TK is None else drop_picks(routing, routing.dropped_TK)


def stock_routers(model: PreTrainedModel, *, tables: bool = False) -> dict[int, StockRouter]:
    """The MoE layers of a stock model, by decoder layer index.

    Args:
        model: the model.
        tables: with those whose picks are a table of token ids, in which there is nothing to balance.

    Raises:
        UnsupportedModel: if it has none, one of them routes as no router of ours does, or it is one of our models.
    """
    if any(isinstance(module, MoEBlock) for module in model.modules()):
        raise UnsupportedModel(f"{type(model).__name__} is a moesaic model: set `balance` in its moe section")
    found: dict[int, StockRouter] = {}
    for name, block in model.named_modules():
        preset = _preset_of(block)
        if preset is None:
            continue
        config = _config_of(model.config, preset.model_type)
        rule = rule_of(preset, config)
        if rule.needs == {"token_ids"} and not tables:
            continue
        if rule.needs - {"token_ids"}:
            raise _needs_more(preset, rule)
        layer = _index(name)
        if layer in found:
            raise UnsupportedModel(f"{type(model).__name__} has MoE layers in more than one stack: give one of them")
        num_experts = preset.weights(block.state_dict())["weight"].shape[0]
        if isinstance(rule, NullExpertsConfig):
            num_experts -= rule.num_null
        found[layer] = StockRouter(layer, block, preset, config, rule, num_experts)
    if not found:
        presets = presets_of(model.config)  # says why, if the family is known
        blocks = {type(module).__name__ for module in model.modules()}
        for preset in presets:
            rule = rule_of(preset, _config_of(model.config, preset.model_type))
            if preset.block in blocks and rule.needs - {"token_ids"}:
                raise _needs_more(preset, rule)
        raise UnsupportedModel(f"{type(model).__name__} has no MoE layer")
    return dict(sorted(found.items()))


def _needs_more(preset: RouterPreset, rule: RouterConfig) -> UnsupportedModel:
    needed = ", ".join(sorted(rule.needs))
    return UnsupportedModel(f"{preset.model_type}: its router looks at {needed}, which can't be read from outside")


def _preset_of(block: nn.Module) -> RouterPreset | None:
    for name, child in block.named_children():
        preset = ROUTER_PRESETS.get(type(child).__name__)
        if preset is not None and preset.child == name and preset.block == type(block).__name__:
            return preset
    return None


def _config_of(config: PreTrainedConfig, model_type: str) -> PreTrainedConfig:
    return next(found for found in _configs(config) if found.model_type == model_type)


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and all that it holds."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _index(name: str) -> int:
    """The number of the layer in the path of a module."""
    numbers = re.findall(r"\.(\d+)(?=\.|$)", name)
    return int(numbers[0]) if numbers else 0


class OwnLoss:
    """The balance loss that a stock head adds itself, switched off and on again.

    It pools all layers, is added once for each micro-batch, and would come on top of ours.

    Args:
        model: with or without such a loss.

    Attributes:
        coefficient: what it was on with, or 0.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._places = [model, *_configs(model.config)]
        self._before: list[tuple[Any, str, Any]] = []
        self.coefficient = self._active()

    def off(self) -> None:
        """Switch it off."""
        for place in self._places:
            for name, value in (("router_aux_loss_coef", 0.0), ("output_router_logits", False)):
                if name in vars(place):
                    self._before.append((place, name, getattr(place, name)))
                    setattr(place, name, value)

    def restore(self) -> None:
        """As it was."""
        for place, name, value in reversed(self._before):
            setattr(place, name, value)
        self._before = []

    def is_back(self) -> bool:
        """Whether someone has switched it on since."""
        return bool(self._active())

    def _active(self) -> float:
        for place in self._places[1:]:
            if getattr(place, "output_router_logits", False):
                return float(getattr(place, "router_aux_loss_coef", 0.0) or 0.0)
        return 0.0
