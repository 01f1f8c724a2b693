"""Whether a contender computes what the `loop` kernel does."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.bench.cases import Cell
from moesaic.bench.inputs import Call
from moesaic.layer.kernels import ExpertWeights, loop

# Distance over length, of all numbers of a tensor together.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def reference(cell: Cell, call: Call) -> dict[str, Tensor]:
    """Output, and in backward cases the gradients, by `loop` in float32, one expert at a time.

    `loop` over a layer of one expert, summed over the experts, needs no second copy of the weights in float32, and no
    packed gradient for each expert.
    """
    backward = cell.kind.backward
    x_TD = call.x_TD.detach().float().requires_grad_(backward)
    weight_TK = call.weight_TK.detach().float().requires_grad_(backward)
    output_TD = torch.zeros_like(x_TD)
    gradients = {name: torch.zeros_like(leaf) for name, leaf in call.leaves.items()} if backward else {}
    sums = {name: torch.zeros_like(leaf) for name, leaf in (("x", x_TD), ("weight", weight_TK))}
    for expert in call.index_TK.unique().tolist():
        up_NHD, down_NDF = (
            packed[expert : expert + 1].detach().float().requires_grad_(backward)
            for packed in (call.weights.up_NHD, call.weights.down_NDF)
        )
        weights = ExpertWeights(up_NHD, down_NDF, call.weights.activate)
        others_TK = (call.index_TK != expert).long()  # 1 is no expert in a layer of one
        with torch.set_grad_enabled(backward):
            y_TD = loop.run(weights, x_TD, others_TK, weight_TK)
        output_TD += y_TD.detach()
        if backward:
            leaves = (x_TD, weight_TK, up_NHD, down_NDF)
            found = torch.autograd.grad(y_TD, leaves, call.upstream_TD.float())
            sums["x"] += found[0]
            sums["weight"] += found[1]
            gradients["up"][expert], gradients["down"][expert] = found[2][0], found[3][0]
    return {"output": output_TD.detach(), **(gradients | sums if backward else {})}


def fault(outcome: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> str | None:
    """What is wrong with an outcome, or None."""
    for name, want in expected.items():
        if name not in outcome:
            return f"gives no {name}"
        if outcome[name].shape != want.shape:
            return f"{name} has shape {tuple(outcome[name].shape)}, not {tuple(want.shape)}"
        error = distance(outcome[name], want)
        if not error <= TOLERANCE[dtype]:
            return f"{name} is {error:.2g} away from the loop kernel's, more than {TOLERANCE[dtype]:g}"
    return None


def distance(found: Tensor, want: Tensor) -> float:
    """Length of the difference over length of `want`; NaN where a number isn't finite.

    Summed row by row of the first axis, since packed gradients are too large to be copied in float32.
    """
    difference = length = 0.0
    for one, other in zip(found, want, strict=True):
        other = other.float()
        difference += float((one.float() - other).square().sum())
        length += float(other.square().sum())
    return (difference / length) ** 0.5 if length else float(difference > 0)
