"""What every router is: a pure function of its inputs and parameters that returns a `Routing`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from moesaic.layer.record import Routing, RoutingContext


class Router(nn.Module, ABC):
    """Scores N experts for each token and picks K of them.

    `forward` must not change the module: under activation checkpointing it runs twice and must give the same record.
    Routers compute in float32 (float64 for float64 input), also under autocast.
    """

    num_experts: int
    top_k: int

    @abstractmethod
    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        """Route T tokens.

        Args:
            x_TD: hidden states of all sequences, flattened.
            context: tokens and lower layers' records of this forward pass; None when the layer is used on its own.
        """

    @staticmethod
    def precision(x_TD: Tensor) -> torch.dtype:
        """The dtype to route in: float32, or float64 where the input is."""
        return torch.promote_types(x_TD.dtype, torch.float32)
