"""What a case has to compute and to move at least, and the time below which no machine can do it."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.bench.models import ModelSize, moe_config
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


def model_forward(shape: Shape, size: ModelSize, tokens: int, context: int, element_size: int) -> Work:
    """A whole model over the tokens of one sequence, the head on the last of them only.

    All weights in use are read once, but of the embeddings only rows; keys and values of the context are read by each
    layer. Of the experts, as many are in use as T tokens with K picks each reach on average when picks are uniform.

    Args:
        shape: of the layers.
        size: layers and vocabulary.
        tokens: T that are given at once.
        context: tokens that attention looks at, all in all.
        element_size: bytes of a number.
    """
    config = moe_config(shape, size)
    query_width = config.num_attention_heads * 64
    key_width = config.num_key_value_heads * 64
    attention = shape.hidden * (2 * query_width + 2 * key_width)
    router = shape.hidden * shape.experts
    head = shape.hidden * size.vocabulary
    touched = shape.experts * (1 - (1 - shape.picks / shape.experts) ** tokens)
    read = size.layers * (attention + router + touched * shape.expert_parameters) + head
    used = size.layers * (attention + router + shape.picks * shape.expert_parameters)
    # Queries with keys and weights with values, 2 FLOPs each; a prompt's tokens see half of it on average.
    seen = context if tokens == 1 else context / 2
    flops = 2.0 * (tokens * used + head) + size.layers * 4.0 * tokens * seen * query_width
    weight_bytes = read * element_size
    cache_bytes = size.layers * 2 * context * key_width * element_size
    return Work(flops, weight_bytes + cache_bytes + tokens * shape.hidden * element_size, weight_bytes)
