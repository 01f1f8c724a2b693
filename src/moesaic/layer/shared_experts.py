"""Shared experts: feed-forward networks that every token passes, beside the routed ones."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from moesaic.configuration import Config
from moesaic.errors import ConfigError
from moesaic.layer.activations import ACTIVATIONS
from moesaic.layer.experts import ActivationName


class SharedExpertsConfig(Config):
    """Experts that are always on (DeepSeekMoE, arXiv 2401.06066, section 3.2).

    Attributes:
        num_experts: how many; they are stored as one network of `num_experts` times the width, which is the same.
        intermediate_size: width of each; None takes the routed experts' width.
        sigmoid_gate: scale their output by the sigmoid of a learned linear map of the token (Qwen2-MoE).
        placement: "parallel" adds their output to that of the routed experts, from the same input. "after" makes them a
            feed-forward network with residual and norm of its own behind the decoder layer: y = x + MoE(norm_a(x)), then
            y + FFN(norm_b(y)), as in ST-MoE (arXiv 2202.08906) and in the code of OpenMoE (2402.01739), whose equation 4
            says "parallel".
    """

    num_experts: PositiveInt = 1
    intermediate_size: PositiveInt | None = None
    sigmoid_gate: bool = False
    placement: Literal["parallel", "after"] = "parallel"

    @model_validator(mode="after")
    def _consistent(self) -> SharedExpertsConfig:
        if self.sigmoid_gate and self.placement == "after":
            raise ConfigError("sigmoid_gate", True, "does not go with placement: after", "set one of the two")
        return self


class SharedExperts(nn.Module):
    """A dense feed-forward network with `gate_proj` (if gated), `up_proj` and `down_proj`."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, activation: ActivationName, gated: bool, bias: bool
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias) if gated else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act_fn = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., D) to (..., D)."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
