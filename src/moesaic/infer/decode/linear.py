"""Linear maps of a few rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.infer.decode.swap import PLAN, Fast
from moesaic.layer.kernels.native import decode


class FastLinear(Fast):
    """`nn.Linear` whose weights are read once at the speed of memory when there are few rows and no graph."""

    def forward(self, input: Tensor) -> Tensor:
        own: nn.Linear = self  # type: ignore[assignment]
        if torch.compiler.is_compiling():
            return self._plain.forward(own, input)
        weight = own._parameters["weight"]
        width = input.shape[-1]
        rows = input.numel() // width if width else 0
        if weight is None or not 0 < rows <= decode.ROWS_MOST or not decode.suits(input, weight):
            return self._plain.forward(own, input)
        plan = own.__dict__[PLAN]
        if plan is None or plan.address != weight.data_ptr():
            plan = own.__dict__[PLAN] = decode.LinearsPlan([(weight, own._parameters["bias"])])
        x_TI = input.reshape(rows, width)
        if x_TI.stride(1) != 1:
            x_TI = x_TI.contiguous()
        return plan(x_TI).view(*input.shape[:-1], plan.outs[0])


def knows(module: nn.Module) -> bool:
    """Whether a module is a plain linear map; quantised, sharded and wrapped ones are not."""
    if type(module) is not nn.Linear:
        return False
    weight = module.weight
    return decode.readable(weight)
