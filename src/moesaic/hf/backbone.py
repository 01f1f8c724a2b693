"""Surgery: a stock decoder whose feed-forward networks are MoE blocks, and the routing context's way to them."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.errors import ConfigError
from moesaic.hf.checkpoint import BACKBONES
from moesaic.hf.compat import backbone_class, initialization, on_meta_device, without_storage
from moesaic.hf.experts import MoesaicExperts
from moesaic.hf.families import Family, family_of
from moesaic.layer import Experts, MoEBlock, MoESpec, Router, RoutingContext

# Keyword under which the context travels from the model's forward to each attention module.
CONTEXT = "routing_context"


class Carried:
    """A routing context on its way down: opaque to FSDP, which would pass each layer a copy of a dataclass with tensors."""

    def __init__(self, context: RoutingContext) -> None:
        self.context = context


def take_context(kwargs: dict[str, Any]) -> RoutingContext | None:
    """The context among the keywords of a layer or its attention, which no longer hold it afterwards."""
    carried: Carried | None = kwargs.pop(CONTEXT, None)
    return None if carried is None else carried.context


class _Waiting(threading.local):
    """A context that waits for the block of its layer, of each thread on its own."""

    context: RoutingContext | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Waiting:
        return _Waiting()

    def __reduce__(self) -> tuple[type[_Waiting], tuple[()]]:
        return _Waiting, ()


class BackboneMoEBlock(MoEBlock):
    """An `MoEBlock` that stock decoder layers can call: they pass hidden states and nothing else.

    The routing context reaches it through the attention module of the same layer, which every layer calls first with
    all extra keywords of the model's forward. So it is right when layers are recomputed under checkpointing, and when
    several forward passes are open at once.
    """

    def __init__(
        self,
        spec: MoESpec,
        hidden_size: int,
        layer: int,
        experts: nn.Module,
        norm: nn.Module | None,
        returns_tuple: bool,
    ) -> None:
        super().__init__(spec, hidden_size, layer, experts, norm)
        self.returns_tuple = returns_tuple
        self._waiting = _Waiting()
        self._traced: RoutingContext | None = None

    @property
    def context(self) -> RoutingContext | None:
        """What waits for the next call."""
        if torch.compiler.is_compiling():
            return self._traced
        found = self._waiting.context
        return self._traced if found is None else found

    @context.setter
    def context(self, context: RoutingContext | None) -> None:
        # Compilers can't trace the storage of threads; hook or block alone may be compiled.
        self._traced = context
        if not torch.compiler.is_compiling():
            self._waiting.context = context

    def receive_context(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """Forward pre-hook of the layer's attention: keep the context and take it out of the keywords."""
        self.context = take_context(kwargs)
        return args, kwargs

    def finish_layer(self, layer: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook of the layer: shared experts placed "after" work on its output."""
        if isinstance(output, tuple):
            return self.follow(output[0]), *output[1:]
        return self.follow(output)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Any:
        y = super().forward(x, context or self.context)
        self.context = None
        return (y, None) if self.returns_tuple else y


class _BackboneMixin:
    """What a stock base model needs to hold our modules."""

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Our experts read the switch in their owner's config; dense families would refuse what is asked for there."""
        return "eager"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = getattr(cast(PreTrainedModel, self).config, "initializer_range", 0.02)
        if isinstance(module, Router):
            module.reset_parameters(std)
            return
        if isinstance(module, MoEBlock):
            module.reset_parameters()
            return
        if not isinstance(module, Experts):
            super()._init_weights(module)  # type: ignore[misc]
            return
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name.endswith("bias"):
                initialization.zeros_(tensor)
            else:
                initialization.normal_(tensor, mean=0.0, std=std)


@functools.cache
def _class_with_experts(stock: type[PreTrainedModel], parts: int) -> type[PreTrainedModel]:
    """The stock base model class extended by the mixin; its name selects the checkpoint names of its experts."""
    name = next(name for name, packed in BACKBONES.items() if len(packed) == parts)
    # transformers keeps what a class can record under its module and qualified name.
    names = {"__module__": __name__, "__qualname__": f"{name}[{stock.__name__}]"}
    return type(name, (_BackboneMixin, stock), {**names, "config_class": stock.config_class})


def build_backbone(config: PreTrainedConfig, owner: PreTrainedConfig, spec: MoESpec) -> PreTrainedModel:
    """The stock base model of `config` with MoE blocks where `spec` places them.

    Weights are uninitialised: the model that owns it initialises all of them in its `post_init`, or loads them.

    Args:
        config: config of the stock family.
        owner: config that carries the experts implementation switch.
        spec: what to place.

    Raises:
        UnsupportedModel: if the family can't be a backbone.
        ConfigError: if the spec does not fit it.
    """
    family = family_of(config)
    target = torch.get_default_device()
    # The stock feed-forward networks are built without storage, then replaced.
    with without_storage():
        backbone = _class_with_experts(backbone_class(config), spec.experts.parts)(config)
        layers = getattr(backbone, family.layers)
        indices = spec.layers.indices(len(layers))
        blocks = [
            _place(layers[index], index, family, config, owner, spec.at(position))
            for position, index in enumerate(indices)
        ]
        if spec.dense_layers is not None:
            _check_dense_layers(spec, set(range(len(layers))) == set(indices), family, config)
            for index, layer in enumerate(layers):
                if index not in indices:
                    setattr(layer, family.feed_forward, spec.dense_layers.build(config.hidden_size))
        for block in blocks[1:]:
            block.gate.share(blocks[0].gate)
    if not on_meta_device():
        backbone.to_empty(device=target)
    return backbone


def _check_dense_layers(spec: MoESpec, all_moe: bool, family: Family, config: PreTrainedConfig) -> None:
    if family.returns_tuple:
        problem = f"can't stand in layers of {config.model_type}, which expect an MoE block"
    elif all_moe:
        problem = "is used by no layer: moe.layers makes all of them MoE"
    else:
        return
    assert spec.dense_layers is not None
    raise ConfigError("moe.dense_layers", spec.dense_layers.to_dict(), problem, "remove it")


def _place(
    layer: nn.Module, index: int, family: Family, config: PreTrainedConfig, owner: PreTrainedConfig, spec: MoESpec
) -> MoEBlock:
    experts = MoesaicExperts(owner, spec.experts, config.hidden_size, may_skip=spec.may_skip)
    follows = spec.shared_experts is not None and spec.shared_experts.placement == "after"
    norm = norm_like(layer, config) if follows else None
    block = BackboneMoEBlock(spec, config.hidden_size, index, experts, norm, family.returns_tuple)
    setattr(layer, family.feed_forward, block)
    if follows:
        # Inside what gradient checkpointing repeats and FSDP gathers, and before whoever captures hidden states.
        layer.register_forward_hook(block.finish_layer)
    attention = cast(nn.Module, getattr(layer, family.attention))
    attention.register_forward_pre_hook(block.receive_context, with_kwargs=True)
    return block


def norm_like(layer: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """A copy of the norm before the layer's feed-forward network.

    Args:
        layer: a decoder layer.
        config: of its family.

    Raises:
        ConfigError: if the family does more around a feed-forward network than that norm and a residual.
    """
    reason, family = None, family_of(config)
    if family.norm is None:
        reason = f"is not known for {config.model_type}, which normalises the output of feed-forward networks"
    elif getattr(config, "residual_multiplier", 1.0) != 1.0:
        reason = f"does not go with residual_multiplier = {config.residual_multiplier} of the backbone"
    if reason is not None:
        raise ConfigError("moe.shared_experts.placement", "after", reason, "use placement: parallel")
    assert family.norm is not None
    return copy.deepcopy(cast(nn.Module, getattr(layer, family.norm)))


def moe_blocks(backbone: PreTrainedModel) -> dict[int, MoEBlock]:
    """The MoE blocks of a backbone by layer index."""
    layers = getattr(backbone, family_of(backbone.config).layers)
    found = {}
    for index, layer in enumerate(layers):
        block = getattr(layer, family_of(backbone.config).feed_forward)
        if isinstance(block, MoEBlock):
            found[index] = block
    return found


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model that it says must stay whole: the units of sharding and recomputation."""
    names: set[str] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            names.update(module._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]
