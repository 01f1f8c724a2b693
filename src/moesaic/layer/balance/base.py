"""What every balance loss is: a config that maps a layer's record to one value for each sequence."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from moesaic.configuration import Config
from moesaic.errors import ConfigError
from moesaic.layer.balance.adaptive import AdaptiveCoefficient
from moesaic.layer.balance.labels import Label
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.schedule import Schedule, Scheduled

if TYPE_CHECKING:
    from moesaic.layer.spec import MoESpec


class BalanceLoss(Config):
    """A loss on the routing of one MoE layer.

    It is reported for each sequence and averaged by the caller with the token weights of the language-model loss. So
    its share of the total does not depend on how sequences are spread over micro-batches, ranks or padding.

    Attributes:
        coefficient: weight of this loss, summed over layers, in the training loss; a number, or a `Schedule` over the
            training (AdaMoE, arXiv 2406.13233, section 3.4, has 0.02, then a step to 0.0001).
        adaptive: let each layer's coefficient follow its drop rate, from `coefficient` on.
        label: name under which the loss is reported; None for its type. Two losses of one type need different names.
    """

    counts_skipped: ClassVar[bool] = False

    coefficient: Scheduled
    adaptive: AdaptiveCoefficient | None = None
    label: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_rule(self) -> BalanceLoss:
        if self.adaptive is not None and isinstance(self.coefficient, Schedule):
            raise ConfigError("adaptive", self.adaptive.to_dict(), "does not go with a schedule", "keep one of the two")
        return self

    @property
    def name(self) -> str:
        """Key under which the loss is reported."""
        return self.label or self.type  # type: ignore[attr-defined]

    @property
    def needs(self) -> frozenset[Label]:
        """Labels of tokens that it tells apart, without which it can't be computed."""
        return frozenset()

    def check(self, spec: MoESpec) -> None:
        """Check against the layers whose records it will read.

        Raises:
            ConfigError: naming the field that does not fit.
        """
        if self.adaptive is not None and self.adaptive.capacity_factor is None and spec.capacity is None:
            raise ConfigError(
                "adaptive.capacity_factor",
                None,
                "is needed where no capacity drops picks",
                "set it, for instance to 1.0, or give the layers a capacity",
            )

    def of_sequences(self, routing: Routing, context: RoutingContext) -> Tensor:
        """`per_sequence` over the tokens that passed the layer, or over all if the loss counts skipped ones."""
        return self.per_sequence(routing, context if self.counts_skipped else routing.context_inside(context))

    @abstractmethod
    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        """Unweighted loss of each sequence, shape (B,); 0 for a sequence of padding only."""
