"""The decoder families that can be a backbone: where their layers keep attention and feed-forward, and their head.

A family is listed when tests/hf/test_backbones.py shows that replacing its feed-forward networks by one-expert copies
leaves its logits as they were. To support another one, add a row here and there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig

from moesaic.errors import UnsupportedModel
from moesaic.hf import feed_forward


def _logits_as_they_are(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    return logits


def _divide_logits(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    return logits / config.logits_scaling


def _soft_cap_logits(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * (logits / cap).tanh()


@dataclass(frozen=True)
class Family:
    """Where a decoder family keeps its parts.

    Attributes:
        layers: attribute of the base model that lists its decoder layers.
        attention: attribute of a layer that holds attention; it runs before the feed-forward network.
        feed_forward: attribute of a layer that holds the feed-forward network or MoE block.
        norm: attribute of a layer that holds the norm before its feed-forward network; None where another one follows it.
        activation: config field with the activation's name.
        dropout: config field with the dropout that the feed-forward network applies to its output, if it does.
        returns_tuple: the layer unpacks its MoE block's output as (hidden, scores).
        finish_logits: what the head does after its linear map.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    feed_forward: str = "mlp"
    norm: str | None = "post_attention_layernorm"
    activation: str = "hidden_act"
    dropout: str | None = None
    returns_tuple: bool = False
    finish_logits: Callable[[Tensor, PreTrainedConfig], Tensor] = _logits_as_they_are


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "olmo": Family(),
    "olmo2": Family(norm=None),
    "smollm3": Family(),
    "phi3": Family(),
    "granite": Family(finish_logits=_divide_logits),
    "gemma": Family(),
    "gemma2": Family(norm=None, activation="hidden_activation", finish_logits=_soft_cap_logits),
    "gemma3_text": Family(norm=None, activation="hidden_activation", finish_logits=_soft_cap_logits),
    "starcoder2": Family(dropout="residual_dropout"),
    "gpt2": Family(layers="h", attention="attn", norm="ln_2", activation="activation_function", dropout="resid_pdrop"),
    "gpt_neox": Family(attention="attention"),
    # Families whose stock layers hold MoE blocks.
    "mixtral": Family(),
    "qwen2_moe": Family(),
    "qwen3_moe": Family(),
    "olmoe": Family(),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(),
    "glm4_moe": Family(),
    "glm4_moe_lite": Family(),
    "dots1": Family(),
    "exaone_moe": Family(),
    "solar_open": Family(),
    "hunyuan_v1_moe": Family(),
    "mellum": Family(),
    "flex_olmo": Family(norm=None),
    "gpt_oss": Family(returns_tuple=True),
    "granitemoe": Family(feed_forward="block_sparse_moe", finish_logits=_divide_logits),
}

# Families that people ask for and that can't be a backbone, with the reason.
REFUSED: dict[str, str] = {
    "opt": "its decoder layers hold the feed-forward projections themselves, there is no module to replace",
    "bloom": "its feed-forward module adds the residual itself",
    "falcon": "its feed-forward module is fused with attention in most checkpoints",
    "t5": "it is an encoder-decoder",
    "bart": "it is an encoder-decoder",
    "mamba": "it has no feed-forward networks",
    "llama4": "its experts weight the input instead of the output",
    "moesaic": "it has MoE layers already; give the backbone it was built on",
    "gemma3": "it is multimodal; use its text part (model type gemma3_text)",
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a config.

    Raises:
        UnsupportedModel: if it can't be a backbone, with the reason and the families that can.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        reason = REFUSED.get(config.model_type, "its layer structure and head have not been verified")
        raise UnsupportedModel(
            f"backbone.model_type = {config.model_type!r} can't be a backbone: {reason}; "
            f"use one of {', '.join(sorted(FAMILIES))}"
        )
    return family


def feed_forward_weights(layer: nn.Module, family: Family, model_type: str) -> feed_forward.FeedForwardWeights:
    """The dense feed-forward weights of a decoder layer.

    Raises:
        UnsupportedModel: if the module there is not a dense feed-forward network of a known layout.
    """
    module = getattr(layer, family.feed_forward)
    weights = feed_forward.read(module)
    if weights is None:
        names = ", ".join(name for name, _ in module.named_children())
        raise UnsupportedModel(
            f"backbone.model_type = {model_type!r}: {type(module).__name__} (with {names}) is not a dense feed-forward "
            "network; give a dense model, or use moesaic.convert for a model that already has experts"
        )
    return weights
