"""A two-layer network as router, for boundaries between experts that are not straight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.parts.best_k import BestKConfig, BestKRouter
from moesaic.layer.routers.parts.inputs import linear

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh}


class MLPConfig(BestKConfig):
    """Fields of the MLP router: logits = W act(V x + b) (ModuleFormer, arXiv 2306.04640, as released).

    It holds H (D + N + 1) parameters for hidden width H, against D N of a linear router.

    Attributes:
        hidden_size: H, the width of the hidden layer (256 in ModuleFormer).
        activation: "gelu" (ModuleFormer), "relu" or "tanh".
        hidden_bias: b; without it there are H fewer parameters.
    """

    type: Literal["mlp"] = "mlp"
    hidden_size: PositiveInt = 256
    activation: Literal["gelu", "relu", "tanh"] = "gelu"
    hidden_bias: bool = True

    def build(self, hidden_size: int, num_experts: int) -> MLPRouter:
        self.check(num_experts)
        return MLPRouter(self, hidden_size, num_experts)


class MLPRouter(BestKRouter[MLPConfig]):
    """Parameters are `hidden_weight` (H, D), `hidden_bias` (H,) and `weight` (N, H)."""

    def __init__(self, config: MLPConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts)
        width = config.hidden_size
        self.hidden_weight = nn.Parameter(torch.empty(width, hidden_size))
        self.hidden_bias = nn.Parameter(torch.empty(width)) if config.hidden_bias else None
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        hidden_TH = _ACTIVATIONS[self.config.activation](linear(x_TD, self.hidden_weight, self.hidden_bias))
        return self.take_best(linear(hidden_TH, self.weight))
