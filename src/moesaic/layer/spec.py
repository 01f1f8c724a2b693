"""`MoESpec`: the whole description of a model's MoE layers."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from moesaic.configuration import Config
from moesaic.errors import ConfigError
from moesaic.layer.balance import BalanceConfig, SelectionBiasUpdate
from moesaic.layer.capacity import CapacityConfig
from moesaic.layer.depth import DepthConfig
from moesaic.layer.experts import ExpertsConfig
from moesaic.layer.feed_forward import FeedForwardConfig
from moesaic.layer.routers import RouterConfig
from moesaic.layer.routers.base import Dependence, Need
from moesaic.layer.shared_experts import SharedExpertsConfig


class LayerPlacement(Config):
    """Which decoder layers are MoE layers; the others keep the backbone's feed-forward network.

    Attributes:
        first_dense: this many layers at the bottom stay dense.
        every: of the rest, every n-th layer is MoE, the n-th first.
        only: explicit layer indices instead of the rule.
        num_experts: experts of each MoE layer, lowest first, instead of the same number for all (a pyramid:
            arXiv 2201.05596, section 4.1).
        top_k: picks in each MoE layer, instead of the same number for all.
    """

    first_dense: NonNegativeInt = 0
    every: PositiveInt = 1
    only: tuple[NonNegativeInt, ...] | None = None
    num_experts: tuple[PositiveInt, ...] | None = None
    top_k: tuple[PositiveInt, ...] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> LayerPlacement:
        if self.only is not None and (self.first_dense, self.every) != (0, 1):
            raise ConfigError("only", self.only, "does not go with first_dense or every", "give the indices alone")
        return self

    def indices(self, num_layers: int) -> tuple[int, ...]:
        """Indices of the MoE layers of a model with `num_layers` layers.

        Raises:
            ConfigError: if no layer would be MoE, or `only` names a layer that the model lacks.
        """
        if self.only is not None:
            beyond = [index for index in self.only if index >= num_layers]
            if beyond:
                raise ConfigError("moe.layers.only", beyond[0], "is not a layer", f"choose 0 to {num_layers - 1}")
        rule = range(self.first_dense + self.every - 1, num_layers, self.every)
        chosen = tuple(sorted(set(rule if self.only is None else self.only)))
        if not chosen:
            raise ConfigError(
                "moe.layers",
                self.to_dict(),
                f"leaves no MoE layer among {num_layers}",
                "lower first_dense or every, or name layers in only",
            )
        for name in ("num_experts", "top_k"):
            values = getattr(self, name)
            if values is not None and len(values) != len(chosen):
                raise ConfigError(
                    f"moe.layers.{name}",
                    values,
                    f"has {len(values)} values for {len(chosen)} MoE layers",
                    f"give one value for each of the layers {list(chosen)}",
                )
        return chosen


class MoESpec(Config):
    """The `moe` section of a run: which layers, which router, which experts, which losses.

    Attributes:
        experts: the routed experts.
        router: how tokens choose experts.
        shared_experts: experts that are always on, or None.
        capacity: how many tokens an expert takes, or None for any number.
        depth: which tokens pass an MoE layer, or None for all (mixture of depths).
        layers: which layers are MoE.
        dense_layers: feed-forward networks of the other layers, instead of the backbone's; None keeps those.
        balance: losses on the routing, each with its coefficient.
        selection_bias_update: how the load of each step moves the router's selection bias; None leaves it as it is.
        dropout: dropout probability on the block's output during training (GPT-2's feed-forward dropout).
    """

    experts: ExpertsConfig
    router: RouterConfig
    shared_experts: SharedExpertsConfig | None = None
    capacity: CapacityConfig | None = None
    depth: DepthConfig | None = None
    layers: LayerPlacement = LayerPlacement()
    dense_layers: FeedForwardConfig | None = None
    balance: tuple[BalanceConfig, ...] = ()
    selection_bias_update: SelectionBiasUpdate | None = None
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> MoESpec:
        try:
            self.router.check(self.experts.num_experts)
        except ConfigError as error:
            raise ConfigError(f"router.{error.field}", error.value, error.problem, error.remedy) from None
        if self.capacity is not None and self.router.refuses_capacity is not None:
            raise ConfigError(
                "capacity",
                self.capacity.to_dict(),
                f"does not go with router {self.router.type}: {self.router.refuses_capacity}",
                "remove it",
            )
        names = [loss.name for loss in self.balance]
        if len(names) != len(set(names)):
            raise ConfigError("balance", names, "names a loss twice", "keep one of them, or give each its own `label`")
        if self.layers.top_k is not None and "top_k" not in type(self.router).model_fields:
            raise ConfigError("layers.top_k", self.layers.top_k, f"means nothing to {self.router.type}", "remove it")
        for position in range(max(map(len, filter(None, (self.layers.num_experts, self.layers.top_k))), default=0)):
            self._check_layer(position)
        if (
            self.depth is not None
            and self.depth.decoding == "threshold"
            and all(loss.type != "depth" for loss in self.balance)
        ):
            raise ConfigError(
                "depth.decoding", "threshold", "is not taught without the balance loss depth", "add it to balance"
            )
        for index, loss in enumerate(self.balance):
            try:
                loss.check(self)
            except ConfigError as error:
                raise ConfigError(f"balance.{index}.{error.field}", error.value, error.problem, error.remedy) from None
        if self.selection_bias_update is not None and not self.router.has_selection_bias:
            raise ConfigError(
                "selection_bias_update",
                self.selection_bias_update.to_dict(),
                f"finds no bias in router {self.router.type}",
                "give it `selection_bias: true`, or leave the update out",
            )
        if self.depth is not None and self.shared_experts is not None and self.shared_experts.placement == "after":
            raise ConfigError(
                "shared_experts.placement",
                "after",
                "does not go with depth, which lets tokens skip the whole block",
                "use placement: parallel",
            )
        if self.shared_experts is not None and self.experts.activation == "clamped_swiglu":
            raise ConfigError("shared_experts", self.shared_experts.to_dict(), "can't use clamped_swiglu", "use silu")
        return self

    def _check_layer(self, position: int) -> None:
        """Check the router against the values that the per-layer lists give one MoE layer."""
        layers, router = self.layers, self.router
        counts = layers.num_experts or (self.experts.num_experts,) * (position + 1)
        if layers.top_k is not None and position < len(layers.top_k):
            router = router.model_copy(update={"top_k": layers.top_k[position]})
        if position >= len(counts):
            return  # the lists are of different length, which `indices` reports with the number of layers
        try:
            router.check(counts[position])
        except ConfigError as error:
            if layers.top_k is not None and error.field == "top_k":
                raise ConfigError(f"layers.top_k.{position}", error.value, error.problem, error.remedy) from None
            raise ConfigError(
                f"layers.num_experts.{position}",
                counts[position],
                f"does not fit the router, whose {error.field} = {error.value!r} {error.problem}",
                "give that layer another number of experts, or change the router",
            ) from None

    @property
    def per_layer(self) -> bool:
        """Whether MoE layers differ in their number of experts or picks."""
        return self.layers.num_experts is not None or self.layers.top_k is not None

    def at(self, position: int) -> MoESpec:
        """The spec of the MoE layer at a position among the MoE layers, without per-layer lists.

        Raises:
            ConfigError: if the values for that layer do not fit together, or its router has no `top_k`.
        """
        if not self.per_layer:
            return self
        values = self.to_dict()
        for section, name in (("experts", "num_experts"), ("router", "top_k")):
            listed = getattr(self.layers, name)
            if listed is not None:
                values[section][name] = listed[position]
            values["layers"][name] = None
        return MoESpec.from_dict(values, where=f"moe (MoE layer {position})")

    @property
    def needs(self) -> frozenset[Need]:
        """What the model must be told of its tokens: what the router looks at, and the labels of balance losses."""
        return self.router.needs.union(*(loss.needs for loss in self.balance))

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        """What the output of a token depends on besides the token itself and earlier ones of its sequence."""
        limited = frozenset[Dependence]() if self.capacity is None else self.capacity.depends_on(training)
        passing = frozenset[Dependence]() if self.depth is None else self.depth.depends_on(training)
        return self.router.depends_on(training) | limited | passing

    @property
    def unservable(self) -> str | None:
        """Why a model with these layers can't decode token by token with a cache, or None if it can."""
        if self.router.unservable is not None:
            return f"moe.router: {self.router.unservable}"
        if self.depth is not None and self.depth.unservable is not None:
            return f"moe.depth: {self.depth.unservable}"
        if self.capacity is not None and self.capacity.limits(training=False):
            return (
                "moe.capacity: how full an expert is depends on the tokens in the cache, which are not routed again; "
                "set eval_factor to null"
            )
        return None

    @property
    def may_skip(self) -> bool:
        """Whether picks may be no expert, because of the router, the capacity or the depth."""
        return self.router.may_skip or self.capacity is not None or self.depth is not None

    @property
    def shared_width(self) -> int:
        """Total hidden width of the shared experts, 0 without."""
        if self.shared_experts is None:
            return 0
        return self.shared_experts.num_experts * (
            self.shared_experts.intermediate_size or self.experts.intermediate_size
        )
