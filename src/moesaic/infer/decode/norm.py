"""Root mean square norms of a few rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.infer.decode import source
from moesaic.infer.decode.swap import PLAN, Fast
from moesaic.layer.kernels.native import decode


class FastNorm(Fast):
    """A stock RMSNorm in one native call when there are few rows and no graph."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        own: Any = self
        if torch.compiler.is_compiling():
            return self._plain.forward(own, hidden_states)
        weight = own._parameters["weight"]
        width = hidden_states.shape[-1]
        few = hidden_states.numel() <= decode.ROWS_MOST * width and hidden_states.is_contiguous()
        if weight is None or not few or width != weight.shape[0] or not decode.suits(hidden_states, weight):
            return self._plain.forward(own, hidden_states)
        plan = own.__dict__[PLAN]
        if plan is None or plan.address != weight.data_ptr():
            plan = own.__dict__[PLAN] = decode.NormPlan(weight, own.variance_epsilon)
        return plan(hidden_states)


def knows(module: nn.Module) -> bool:
    """Whether a module's code is that of Llama's RMSNorm."""
    return decode.readable(module._parameters.get("weight")) and source.says(type(module).forward, source.RMS_NORM)
