"""The shape of a published model: what is needed to count it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import NonNegativeInt, PositiveInt, model_validator

from moesaic.configuration import Config
from moesaic.errors import ConfigError
from moesaic.layer import LayerPlacement

if TYPE_CHECKING:
    from moesaic.catalog.schema import Preset

# Matrices of a feed-forward network: 2 plain, 3 gated, 4 with two gates.
Matrices = Literal[2, 3, 4]

# Model types of transformers whose feed-forward networks have no gate.
_PLAIN = frozenset({"gpt2", "gpt_neox", "starcoder2"})


class LatentAttention(Config):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Attributes:
        query_rank: width of the compressed queries; None if they are not compressed.
        key_value_rank: width of the compressed keys and values.
        nope_dim: width of a head's queries and keys without rotary positions.
        rope_dim: width with them; the keys of that part are shared by all heads.
        value_dim: width of a head's values.
    """

    query_rank: PositiveInt | None
    key_value_rank: PositiveInt
    nope_dim: PositiveInt
    rope_dim: PositiveInt
    value_dim: PositiveInt


class AttentionExperts(Config):
    """Attention heads as experts: each has the queries and the output of all its heads, keys and values are shared."""

    num_experts: PositiveInt
    top_k: PositiveInt


class Shape(Config):
    """Widths and numbers of layers, heads and experts. What its authors do not say is None.

    Attributes:
        layers: decoder layers, or the layers of the only stack.
        encoder_layers: layers of an encoder beside it.
        hidden: width of the residual stream.
        heads: attention heads.
        kv_heads: heads of keys and values; None with latent attention.
        head_dim: width of a head; None with latent attention.
        latent_attention: in place of the two above.
        attention_experts: attention that is routed, too.
        vocabulary: rows of the embedding.
        tied_embeddings: whether the output head is the embedding.
        dense_width: hidden width of the feed-forward networks of layers that are not MoE.
        expert_width: hidden width of one routed expert.
        shared_width: total hidden width of all experts that are always on.
        dense_matrices: weight matrices of a dense network.
        expert_matrices: weight matrices of an expert, routed or shared.
        activation: by the name that its authors use.
        num_experts: routed experts of a layer, or of each MoE layer, lowest first.
        top_k: routed picks of a token; None where there is no choice (soft routing).
        num_null: null experts beside them.
        num_shared: experts that are always on, as their authors count them.
        placement: which layers are MoE layers.
    """

    layers: PositiveInt
    encoder_layers: NonNegativeInt = 0
    hidden: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    latent_attention: LatentAttention | None = None
    attention_experts: AttentionExperts | None = None
    vocabulary: PositiveInt | None = None
    tied_embeddings: bool | None = None
    dense_width: PositiveInt | None = None
    expert_width: PositiveInt | None = None
    shared_width: NonNegativeInt = 0
    dense_matrices: Matrices = 3
    expert_matrices: Matrices = 3
    activation: str
    num_experts: PositiveInt | tuple[PositiveInt, ...]
    top_k: PositiveInt | None
    num_null: NonNegativeInt = 0
    num_shared: NonNegativeInt = 0
    placement: LayerPlacement = LayerPlacement()

    @model_validator(mode="after")
    def _consistent(self) -> Shape:
        moe_layers = len(self.moe_layers)
        if isinstance(self.num_experts, tuple) and len(self.num_experts) != moe_layers:
            raise ConfigError(
                "num_experts",
                self.num_experts,
                f"has {len(self.num_experts)} values for {moe_layers} MoE layers",
                "give one value for each",
            )
        if (self.latent_attention is None) == (self.kv_heads is None or self.head_dim is None):
            raise ConfigError(
                "kv_heads",
                self.kv_heads,
                "is missing",
                "give kv_heads and head_dim, or latent_attention in their place",
            )
        return self

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers."""
        return self.placement.indices(self.layers)

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Routed experts of each MoE layer."""
        if isinstance(self.num_experts, tuple):
            return self.num_experts
        return (self.num_experts,) * len(self.moe_layers)

    @classmethod
    def of(cls, preset: Preset) -> Shape:
        """The shape of a preset, read from the keys of its backbone and its MoE layers.

        Keys that the backbone does not give count as: as many heads of keys and values as of queries, heads that share
        the hidden width, embeddings that are not tied (tied for gpt2).
        """
        backbone, moe = preset.backbone, preset.moe
        heads, hidden = backbone["num_attention_heads"], backbone["hidden_size"]
        latent = _latent(backbone)
        experts, shared = moe.experts, moe.shared_experts
        counts = moe.layers.num_experts
        dense = len(moe.layers.indices(backbone["num_hidden_layers"])) < backbone["num_hidden_layers"]
        width, dense_matrices = backbone.get("intermediate_size") or 4 * hidden, 3
        if moe.dense_layers is not None:
            width, dense_matrices = moe.dense_layers.intermediate_size, moe.dense_layers.parts + 1
        elif backbone["model_type"] in _PLAIN:
            dense_matrices = 2
        return cls(
            layers=backbone["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=None if latent else backbone.get("num_key_value_heads") or heads,
            head_dim=None if latent else backbone.get("head_dim") or hidden // heads,
            latent_attention=latent,
            vocabulary=backbone["vocab_size"],
            tied_embeddings=backbone.get("tie_word_embeddings", backbone["model_type"] == "gpt2"),
            dense_width=width if dense else None,
            expert_width=experts.intermediate_size,
            shared_width=moe.shared_width,
            dense_matrices=cast(Matrices, dense_matrices),
            expert_matrices=cast(Matrices, experts.parts + 1),
            activation=experts.activation,
            num_experts=experts.num_experts if counts is None else counts,
            top_k=2 if moe.router.type == "sampled_second" else getattr(moe.router, "top_k", None),
            num_null=getattr(moe.router, "num_null", 0),
            num_shared=0 if shared is None else shared.num_experts,
            placement=moe.layers.model_copy(update={"num_experts": None, "top_k": None}),
        )


def _latent(backbone: dict[str, Any]) -> LatentAttention | None:
    if "kv_lora_rank" not in backbone:
        return None
    return LatentAttention(
        query_rank=backbone["q_lora_rank"],
        key_value_rank=backbone["kv_lora_rank"],
        nope_dim=backbone["qk_nope_head_dim"],
        rope_dim=backbone["qk_rope_head_dim"],
        value_dim=backbone["v_head_dim"],
    )
