"""`MoESpec`: the whole description of a model's MoE layers."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from moesaic.configuration import Config
from moesaic.errors import ConfigError
from moesaic.layer.balance import BalanceConfig
from moesaic.layer.experts import ExpertsConfig
from moesaic.layer.routers import RouterConfig
from moesaic.layer.shared_experts import SharedExpertsConfig


class LayerPlacement(Config):
    """Which decoder layers are MoE layers; the others keep the backbone's feed-forward network.

    Attributes:
        first_dense: this many layers at the bottom stay dense.
        every: of the rest, every n-th layer is MoE, the n-th first.
        only: explicit layer indices instead of the rule.
    """

    first_dense: NonNegativeInt = 0
    every: PositiveInt = 1
    only: tuple[NonNegativeInt, ...] | None = None

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
                raise ConfigError("layers.only", beyond[0], "is not a layer", f"choose 0 to {num_layers - 1}")
        rule = range(self.first_dense + self.every - 1, num_layers, self.every)
        chosen = tuple(sorted(set(rule if self.only is None else self.only)))
        if not chosen:
            raise ConfigError(
                "layers",
                self.to_dict(),
                f"leaves no MoE layer among {num_layers}",
                "lower first_dense or every, or name layers in only",
            )
        return chosen


class MoESpec(Config):
    """The `moe` section of a run: which layers, which router, which experts, which losses.

    Attributes:
        experts: the routed experts.
        router: how tokens choose experts.
        shared_experts: experts that are always on, or None.
        layers: which layers are MoE.
        balance: losses on the routing, each with its coefficient.
        dropout: dropout probability on the block's output during training (GPT-2's feed-forward dropout).
    """

    experts: ExpertsConfig
    router: RouterConfig
    shared_experts: SharedExpertsConfig | None = None
    layers: LayerPlacement = LayerPlacement()
    balance: tuple[BalanceConfig, ...] = ()
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> MoESpec:
        try:
            self.router.check(self.experts.num_experts)
        except ConfigError as error:
            raise ConfigError(f"router.{error.field}", error.value, error.problem, error.remedy) from None
        names = [loss.name for loss in self.balance]
        if len(names) != len(set(names)):
            raise ConfigError("balance", names, "names a loss twice", "keep one entry for each type")
        if self.shared_experts is not None and self.experts.activation == "clamped_swiglu":
            raise ConfigError("shared_experts", self.shared_experts.to_dict(), "can't use clamped_swiglu", "use silu")
        return self

    @property
    def shared_width(self) -> int:
        """Total hidden width of the shared experts, 0 without."""
        if self.shared_experts is None:
            return 0
        return self.shared_experts.num_experts * (
            self.shared_experts.intermediate_size or self.experts.intermediate_size
        )
