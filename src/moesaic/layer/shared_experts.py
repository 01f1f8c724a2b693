"""Shared experts: feed-forward networks that every token passes, beside the routed ones."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, model_validator

from moesaic.configuration import Config
from moesaic.errors import ConfigError
from moesaic.layer.feed_forward import FeedForward


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


class SharedExperts(FeedForward):
    """The network that the shared experts of a layer are together."""
