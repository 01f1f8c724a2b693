"""A dense feed-forward network with the activations that experts have."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from moesaic.configuration import Config
from moesaic.errors import ConfigError
from moesaic.layer.activations import ACTIVATIONS
from moesaic.layer.experts import ActivationName


class FeedForwardConfig(Config):
    """The feed-forward networks of layers that are not MoE, in place of the backbone's.

    For decoders whose dense layers compute what the backbone's family has no word for, as OpenMoE's double gate.

    Attributes:
        intermediate_size: hidden width.
        activation: as for experts, without gpt-oss's.
        gated: a gate beside the up projection.
        bias: projections have biases.
    """

    intermediate_size: PositiveInt
    activation: Literal["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "swiglu_double"] = (
        "silu"
    )
    gated: bool = True
    bias: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> FeedForwardConfig:
        if self.activation == "swiglu_double" and not self.gated:
            raise ConfigError("gated", False, "does not go with swiglu_double", "set gated: true")
        return self

    @property
    def parts(self) -> int:
        """Matrices in the first projection, as of experts."""
        return 3 if self.activation == "swiglu_double" else 2 if self.gated else 1

    def build(self, hidden_size: int) -> FeedForward:
        """One such network."""
        return FeedForward(
            hidden_size, self.intermediate_size, activation=self.activation, gated=self.gated, bias=self.bias
        )


class FeedForward(nn.Module):
    """`gate_proj` (if gated), `up_proj` and `down_proj`; with "swiglu_double" also `gate_linear_proj`.

    Args:
        hidden_size: D.
        intermediate_size: hidden width.
        activation: that of experts but "clamped_swiglu".
        gated: a gate beside the up projection.
        bias: projections have biases.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, activation: ActivationName, gated: bool, bias: bool
    ) -> None:
        super().__init__()
        double = activation == "swiglu_double"
        self.gate_linear_proj = nn.Linear(hidden_size, intermediate_size, bias=bias) if double else None
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias) if gated else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act_fn = ACTIVATIONS["silu" if double else activation]

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., D) to (..., D)."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        gate = self.act_fn(self.gate_proj(x))
        if self.gate_linear_proj is not None:
            gate = self.gate_linear_proj(x) * gate
        return self.down_proj(gate * self.up_proj(x))
