"""What the kernels compute between the two projections, as plain values that custom ops can take."""

from __future__ import annotations

from typing import NamedTuple

from moesaic.layer.kernels.activation import FusedActivation


class Formula(NamedTuple):
    """A `FusedActivation` as kernels know it.

    Attributes:
        activation: one of `activation.ACTIVATIONS`.
        gated: the first projection has a gate and an up half: act(gate) * up.
        interleaved: gate and up alternate along the first projection's output; else gate comes first.
        alpha: sigmoid gain of "clamped_swiglu".
        limit: clamp of "clamped_swiglu".
    """

    activation: str
    gated: bool = False
    interleaved: bool = False
    alpha: float = 0.0
    limit: float = 0.0

    @classmethod
    def of(cls, fused: FusedActivation) -> Formula:
        """The same activation."""
        return cls(fused.name, fused.gated, fused.gated and fused.interleaved, fused.alpha or 0.0, fused.limit or 0.0)

    @property
    def two_halves(self) -> bool:
        """Gate and up are two products over the same rows; if they alternate, they are one."""
        return self.gated and not self.interleaved


IDENTITY = Formula("identity")
