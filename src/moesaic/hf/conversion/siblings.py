"""Dense families whose decoder, with MoE layers in it, is a stock MoE family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import AutoConfig, PreTrainedConfig

from moesaic.errors import UnsupportedExport


@dataclass(frozen=True)
class Sibling:
    """The MoE family with the same decoder as a dense one.

    Attributes:
        model_type: of the MoE family.
        refuses: why it can't say what this dense config says, or None if it can.
        extra: fields that its class takes without declaring them.
    """

    model_type: str
    refuses: Callable[[PreTrainedConfig], str | None]
    extra: tuple[str, ...] = ()


def _nothing(config: PreTrainedConfig) -> str | None:
    return None


def _attention_bias(config: PreTrainedConfig) -> str | None:
    return "attention_bias = True: mixtral's attention has no biases" if config.attention_bias else None


def _sliding_layers(config: PreTrainedConfig) -> str | None:
    if "sliding_attention" in config.layer_types:
        return f"layer_types = {config.layer_types}: qwen3_moe can't mix full and sliding attention"
    return None


SIBLINGS: dict[str, Sibling] = {
    "llama": Sibling("mixtral", _attention_bias),
    "mistral": Sibling("mixtral", _nothing),
    "qwen3": Sibling("qwen3_moe", _sliding_layers, extra=("head_dim",)),
    "granite": Sibling("granitemoe", _nothing, extra=("head_dim",)),
}

# Fields that say what a config is, not what it asks for.
_BOOKKEEPING = {"model_type", "architectures", "transformers_version"}


def sparse_sibling(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the MoE family whose decoder equals that of a dense config; its MoE fields are still defaults.

    Raises:
        UnsupportedExport: if there is no such family, or it can't say what the config says.
    """
    sibling = SIBLINGS.get(config.model_type)
    if sibling is None:
        raise UnsupportedExport(
            f"backbone.model_type = {config.model_type!r}: no stock MoE family has this decoder; "
            f"dense backbones that have one are {', '.join(sorted(SIBLINGS))}"
        )
    reason = sibling.refuses(config)
    if reason is not None:
        raise UnsupportedExport(f"backbone.{reason}")
    known = AutoConfig.for_model(sibling.model_type).to_dict().keys() - _BOOKKEEPING
    values = {name: value for name, value in config.to_dict().items() if name in known}
    extra = {name: getattr(config, name, None) for name in sibling.extra}
    values |= {name: value for name, value in extra.items() if value is not None}
    return AutoConfig.for_model(sibling.model_type, **values)
