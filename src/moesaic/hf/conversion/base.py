"""What a stock MoE family is to us: how its config reads as a `MoESpec`, and how its block's tensors are named."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig

from moesaic.errors import ConfigError, UnsupportedExport, UnsupportedModel
from moesaic.hf.router_presets import unsupported
from moesaic.layer import LayerPlacement, MoESpec, TopKConfig
from moesaic.layer.activations import ACTIVATIONS
from moesaic.layer.balance.conversions import from_transformers


class FamilyConversion(ABC):
    """One stock family, or several that mean the same by the same config fields.

    Attributes:
        names: where our block's children (keys) are called differently in the stock block (values).
    """

    names: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def values(self, config: PreTrainedConfig) -> dict[str, Any]:
        """`MoESpec` as a dict, without validation.

        Raises:
            UnsupportedModel: if a field asks for something that a spec can't say.
        """

    @abstractmethod
    def restrict(self, config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
        """The config fields with which this family comes closest to `spec`.

        Whether that is close enough is not decided here: `export` reads the changed config back and compares.
        """

    def spec(self, config: PreTrainedConfig) -> MoESpec:
        """What the stock model computes, as a spec.

        Raises:
            UnsupportedModel: if a spec can't say it, naming the field.
        """
        if not config.num_experts_per_tok:
            raise unsupported(config, "num_experts_per_tok", "picks no expert", "set it")
        try:
            spec = MoESpec.from_dict(self.values(config), where="moe")
            spec.layers.indices(config.num_hidden_layers)
        except ConfigError as error:
            raise UnsupportedModel(f"{config.model_type}: {error}") from None
        return spec

    def to_block(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State dict of the stock block (or gradients under its names) as that of our `MoEBlock`."""
        return rename(tensors, {stock: ours for ours, stock in self.names.items()})

    def to_stock(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `to_block`."""
        return rename(tensors, self.names)


def top_k_router(spec: MoESpec) -> TopKConfig:
    """The router of a spec, which is of the only kind that stock families have.

    Raises:
        UnsupportedExport: if it is of another kind.
    """
    if not isinstance(spec.router, TopKConfig):
        raise UnsupportedExport(f"moe.router.type = {spec.router.type!r}: stock families only have top_k routers")
    return spec.router


def rename(tensors: Mapping[str, Tensor], children: Mapping[str, str]) -> dict[str, Tensor]:
    """Exchange the first component of each name."""
    renamed = {}
    for name, tensor in tensors.items():
        child, dot, rest = name.partition(".")
        renamed[children.get(child, child) + dot + rest] = tensor
    return renamed


def read_balance(config: PreTrainedConfig, layers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The balance loss that the stock head adds, if it does.

    `from_transformers` says how far it is the same.
    """
    if not (config.output_router_logits and config.router_aux_loss_coef):
        return []
    num_layers = len(LayerPlacement.from_dict(layers).indices(config.num_hidden_layers))
    coefficient = from_transformers(config.router_aux_loss_coef, config.num_experts_per_tok, num_layers)
    return [{"type": "load_balancing", "coefficient": coefficient, "scope": "batch"}]


def activation_field(config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
    """`hidden_act` for the experts of `spec`, unless dense layers, which share the field, remain."""
    all_moe = len(spec.layers.indices(config.num_hidden_layers)) == config.num_hidden_layers
    return {"hidden_act": spec.experts.activation} if all_moe and spec.experts.activation in ACTIVATIONS else {}


def sparse_layers(config: PreTrainedConfig) -> dict[str, Any]:
    """Placement by the config's list of "dense" and "sparse" layers."""
    only = [index for index, kind in enumerate(config.mlp_layer_types) if kind == "sparse"]
    if not only:
        raise unsupported(config, "mlp_layer_types", "leaves no MoE layer", "use moesaic.upcycle for dense models")
    return {"only": only}


def mlp_layer_types(config: PreTrainedConfig, spec: MoESpec) -> dict[str, Any]:
    """The list from which `sparse_layers` reads the placement of `spec`."""
    sparse = spec.layers.indices(config.num_hidden_layers)
    kinds = ["sparse" if index in sparse else "dense" for index in range(config.num_hidden_layers)]
    return {"mlp_layer_types": kinds}
