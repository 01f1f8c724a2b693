"""Shared experts: feed-forward networks that every token passes, beside the routed ones."""

from __future__ import annotations

from pydantic import PositiveInt
from torch import Tensor, nn

from moesaic.configuration import Config
from moesaic.layer.activations import ACTIVATIONS
from moesaic.layer.experts import ActivationName


class SharedExpertsConfig(Config):
    """Experts that are always on (DeepSeekMoE, arXiv 2401.06066, section 3.2).

    Attributes:
        num_experts: how many; they are stored as one network of `num_experts` times the width, which is the same.
        intermediate_size: width of each; None takes the routed experts' width.
        sigmoid_gate: scale their output by the sigmoid of a learned linear map of the token (Qwen2-MoE).
    """

    num_experts: PositiveInt = 1
    intermediate_size: PositiveInt | None = None
    sigmoid_gate: bool = False


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
