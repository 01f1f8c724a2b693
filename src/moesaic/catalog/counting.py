"""Parameters, FLOPs and memory of a shape, by the rule that surveys count with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from moesaic.catalog.shape import Shape
from moesaic.errors import ConfigError

DtypeName = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4"]

_BITS: dict[str, int] = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4}


class CannotCount(ConfigError):
    """A shape of which something is not published, or that the rule does not cover."""


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part of a model: stored, and used for one token."""

    total: int
    active: int


@dataclass(frozen=True)
class Size:
    """What a shape costs.

    Counted are weight matrices: embedding and output head (once where they are tied), attention, routers with one row
    for each expert, experts and dense networks. Norms, biases, positions and gates of shared experts are not. A token
    uses the top_k experts of its layer and everything else.

    Attributes:
        parts: parameters by part.
        matmul_parameters: active parameters that a token is multiplied with: without the embedding, with the head also
            where it is tied.
        attention_width: width of queries and keys plus width of values over all heads, summed over layers.
        cached_numbers: numbers that a cache of keys and values holds for each token: with latent attention the
            compressed ones and the shared rotary key, as DeepSeek serves it.
    """

    parts: dict[str, PartCount]
    matmul_parameters: int
    attention_width: int
    cached_numbers: int

    @property
    def total(self) -> int:
        """Parameters stored."""
        return sum(part.total for part in self.parts.values())

    @property
    def active(self) -> int:
        """Parameters used for one token, the embedding counted in full."""
        return sum(part.active for part in self.parts.values())

    def counted(self, what: str) -> PartCount:
        """Total and active as an author counts them: `what` is a value of `ParameterCount.counts`."""
        left_out = {
            "model": frozenset[str](),
            "without_input_embedding": frozenset({"embedding"}),
            "without_embeddings": frozenset({"embedding", "output head"}),
            "experts": self.parts.keys() - {"routed experts", "shared experts"},
        }[what]
        kept = [part for name, part in self.parts.items() if name not in left_out]
        return PartCount(sum(part.total for part in kept), sum(part.active for part in kept))

    def flops_per_token(self, context_length: int) -> int:
        """Floating-point operations of a token's forward pass at that many positions; training takes three times as many.

        2 P + 2 T w with P the matmul parameters, T the context length and w the attention width, as in
        `moesaic.trace.Accounting`: every position is counted, as if no causal mask or window spared any.
        """
        if context_length < 1:
            raise ConfigError("context_length", context_length, "is not a length", "choose 1 or more")
        return 2 * self.matmul_parameters + 2 * context_length * self.attention_width

    def weight_bytes(self, dtype: DtypeName) -> int:
        """Bytes of all weights stored in `dtype`, without scales of quantisation."""
        return self.total * bits(dtype) // 8

    def cache_bytes_per_token(self, dtype: DtypeName) -> int:
        """Bytes that each token of a sequence adds to the cache of keys and values, windows not considered."""
        return self.cached_numbers * bits(dtype) // 8

    def to_dict(self, *, context_length: int, dtype: DtypeName) -> dict[str, Any]:
        """Plain JSON-able dict."""
        return {
            "parameters": {"total": self.total, "active": self.active},
            "parts": {name: {"total": part.total, "active": part.active} for name, part in self.parts.items()},
            "context_length": context_length,
            "flops_per_token": self.flops_per_token(context_length),
            "dtype": dtype,
            "weight_bytes": self.weight_bytes(dtype),
            "cache_bytes_per_token": self.cache_bytes_per_token(dtype),
        }


def bits(dtype: str) -> int:
    """Bits of a number.

    Raises:
        ConfigError: if there is no such dtype.
    """
    if dtype not in _BITS:
        raise ConfigError("dtype", dtype, "is not a dtype", f"choose one of {', '.join(get_args(DtypeName))}")
    return _BITS[dtype]


def size_of(shape: Shape) -> Size:
    """Count a shape.

    Raises:
        CannotCount: naming what is not published.
    """
    if shape.encoder_layers:
        raise CannotCount(
            "encoder_layers", shape.encoder_layers, "is not covered", "the rule counts one stack of layers"
        )
    hidden, width, picks = shape.hidden, _known(shape, "expert_width"), _known(shape, "top_k")
    embedding = _known(shape, "vocabulary") * hidden
    tied = _known(shape, "tied_embeddings")
    attention = _attention(shape)
    expert = shape.expert_matrices * hidden * width
    counts = shape.experts_per_layer
    dense_layers = shape.layers - len(counts)
    dense = dense_layers * shape.dense_matrices * hidden * _known(shape, "dense_width") if dense_layers else 0
    router = sum(counts) * hidden + len(counts) * shape.num_null * hidden
    shared = len(counts) * shape.expert_matrices * hidden * shape.shared_width
    # Null experts take their share of the picks and have no parameters.
    active_experts = sum(picks * count / (count + shape.num_null) for count in counts) * expert
    parts = {
        "embedding": PartCount(embedding, embedding),
        "attention": attention,
        "router": PartCount(router, router),
        "routed experts": PartCount(sum(counts) * expert, round(active_experts)),
        "shared experts": PartCount(shared, shared),
        "dense FFN": PartCount(dense, dense),
        "output head": PartCount(0, 0) if tied else PartCount(embedding, embedding),
    }
    parts = {name: part for name, part in parts.items() if part.total}
    active = sum(part.active for part in parts.values())
    return Size(
        parts=parts,
        matmul_parameters=active if tied else active - embedding,
        attention_width=shape.layers * _attention_width(shape),
        cached_numbers=shape.layers * _cached_numbers(shape),
    )


def _known(shape: Shape, field: str) -> Any:
    value = getattr(shape, field)
    if value is None:
        raise CannotCount(field, None, "is not published", "without it the parameters can't be counted")
    return value


def _attention(shape: Shape) -> PartCount:
    hidden, heads, layers = shape.hidden, shape.heads, shape.layers
    latent = shape.latent_attention
    if latent is not None:
        queries = heads * (latent.nope_dim + latent.rope_dim)
        rank = latent.query_rank
        query = hidden * queries if rank is None else hidden * rank + rank * queries
        shared = hidden * (latent.key_value_rank + latent.rope_dim)
        unpacked = latent.key_value_rank * heads * (latent.nope_dim + latent.value_dim)
        count = layers * (query + shared + unpacked + heads * latent.value_dim * hidden)
        return PartCount(count, count)
    assert shape.kv_heads is not None, "the shape was checked"
    assert shape.head_dim is not None, "the shape was checked"
    keys_values = 2 * hidden * shape.kv_heads * shape.head_dim
    experts = shape.attention_experts
    if experts is None:
        count = layers * (2 * hidden * heads * shape.head_dim + keys_values)
        return PartCount(count, count)
    # Each expert has the queries and the output of one set of heads; a router picks among them.
    each, router = 2 * hidden * shape.kv_heads * shape.head_dim, experts.num_experts * hidden
    total, active = (layers * (number * each + keys_values + router) for number in (experts.num_experts, experts.top_k))
    return PartCount(total, active)


def _attention_width(shape: Shape) -> int:
    latent = shape.latent_attention
    if latent is not None:
        return shape.heads * (latent.nope_dim + latent.rope_dim + latent.value_dim)
    return 2 * shape.heads * (shape.head_dim or 0)


def _cached_numbers(shape: Shape) -> int:
    latent = shape.latent_attention
    if latent is not None:
        return latent.key_value_rank + latent.rope_dim
    return 2 * (shape.kv_heads or 0) * (shape.head_dim or 0)
