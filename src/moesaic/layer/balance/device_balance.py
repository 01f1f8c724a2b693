"""Balance among devices that hold groups of experts: computation, and communication."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt, model_validator
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer.balance.base import BalanceLoss
from moesaic.layer.balance.sums import Scope, frequencies, mean_over, picks, probabilities
from moesaic.layer.record import Routing, RoutingContext

if TYPE_CHECKING:
    from moesaic.layer.spec import MoESpec


class _OverDevices(BalanceLoss):
    """A loss on devices 0 to D - 1 that hold equal groups of experts, in index order."""

    num_devices: PositiveInt
    scope: Scope = "sequence"

    def check(self, spec: MoESpec) -> None:
        super().check(spec)
        for num_experts in (spec.experts.num_experts, *(spec.layers.num_experts or ())):
            if num_experts % self.num_devices:
                raise ConfigError(
                    "num_devices",
                    self.num_devices,
                    f"does not divide num_experts ({num_experts})",
                    f"choose from {[n for n in range(1, num_experts + 1) if num_experts % n == 0]}",
                )

    def by_device(self, values_XM: Tensor, routing: Routing) -> Tensor:
        """Values of the experts of each device, (X, D, N / D); null experts stand on none."""
        return values_XM[:, : routing.num_experts].unflatten(-1, (self.num_devices, -1))

    def device_probabilities(self, routing: Routing, context: RoutingContext) -> Tensor:
        """P'_d, the sum of P_i over the experts of each device, (B, D)."""
        return self.by_device(mean_over(probabilities(routing), context, self.scope), routing).sum(-1)


class DeviceBalance(_OverDevices):
    """sum_d f'_d P'_d: f'_d is the mean of f_i over the experts of device d, P'_d the sum of P_i.

    Source: DeepSeekMoE (arXiv 2401.06066, eq. 15-17), with a coefficient of 0.05. f and P are those of
    `load_balancing`. 1 when devices are balanced, whatever happens inside them; at most D, or D / K if K experts are
    on K devices. One device gives the constant 1.

    Attributes:
        num_devices: D.
        scope: tokens over which f and P are taken; only "sequence" is independent of accumulation and world size.
    """

    type: Literal["device_balance"] = "device_balance"

    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        f_BD = self.by_device(frequencies(routing, context, self.scope), routing).mean(-1)
        return (f_BD * self.device_probabilities(routing, context)).sum(-1)


class CommunicationBalance(_OverDevices):
    """sum_d f''_d P'_d: f''_d is D / (M T) times the number of tokens that are sent to device d.

    Source: DeepSeek-V2 (arXiv 2405.04434, section 2.2.3), with a coefficient of 0.02, D = 8 and M = 3. P'_d as for
    `device_balance`. 1 when devices receive equally many tokens and every token goes to M devices, less if they go to
    fewer.

    Attributes:
        num_devices: D.
        devices_per_token: M, devices that a token may go to.
        scope: tokens over which f and P are taken; only "sequence" is independent of accumulation and world size.
    """

    type: Literal["communication_balance"] = "communication_balance"
    devices_per_token: PositiveInt

    @model_validator(mode="after")
    def _fits(self) -> CommunicationBalance:
        if self.devices_per_token > self.num_devices:
            raise ConfigError(
                "devices_per_token",
                self.devices_per_token,
                f"is larger than num_devices ({self.num_devices})",
                f"choose 1 to {self.num_devices}",
            )
        return self

    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        sent_TD = self.by_device(picks(routing), routing).sum(-1).clamp(max=1)
        f_BD = mean_over(sent_TD, context, self.scope) * (self.num_devices / self.devices_per_token)
        return (f_BD * self.device_probabilities(routing, context)).sum(-1)
