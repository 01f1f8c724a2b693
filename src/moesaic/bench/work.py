"""What a case has to compute and to move at least, and the time below which no machine can do it."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.bench.shapes import Shape


@dataclass(frozen=True)
class Work:
    """The least work of one call.

    Attributes:
        flops: multiplications and additions of the projections.
        bytes: all that must pass between memory and cores.
        weight_bytes: the part of `bytes` that is weights which are read.
    """

    flops: float
    bytes: float
    weight_bytes: float

    def floor(self, bandwidth: float, rate: float) -> float:
        """Seconds: the larger of bytes over bytes a second and FLOPs over FLOPs a second."""
        return max(self.bytes / bandwidth, self.flops / rate)


def layer_forward(shape: Shape, tokens: int, touched: float, element_size: int) -> Work:
    """Experts forward: the touched experts' weights are read once, the tokens once read and once written.

    What lies between the two projections can stay in a cache and does not count.

    Args:
        shape: the layer.
        tokens: T.
        touched: how many experts have rows.
        element_size: bytes of a number.
    """
    weight_bytes = touched * shape.expert_parameters * element_size
    flops = 2.0 * tokens * shape.picks * shape.expert_parameters
    return Work(flops, weight_bytes + 2 * tokens * shape.hidden * element_size, weight_bytes)


def layer_forward_backward(shape: Shape, tokens: int, touched: float, element_size: int) -> Work:
    """Experts forward and backward.

    Three times the FLOPs of the forward. The weights are read twice; the packed gradient is written for all N experts,
    since those without rows need zeros; the first projection's rows (T*K, 2F) are kept and read again; tokens and their
    gradients pass twice each.
    """
    forward = layer_forward(shape, tokens, touched, element_size)
    gradient_bytes = shape.experts * shape.expert_parameters * element_size
    kept_bytes = 2 * tokens * shape.picks * 2 * shape.width * element_size
    token_bytes = 4 * tokens * shape.hidden * element_size
    weight_bytes = 2 * forward.weight_bytes
    return Work(3 * forward.flops, weight_bytes + gradient_bytes + kept_bytes + token_bytes, weight_bytes)
