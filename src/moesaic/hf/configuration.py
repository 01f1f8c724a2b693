"""`MoesaicConfig`: a stock backbone config and the description of its MoE layers."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from moesaic.hf.compat import SubConfigSpec
from moesaic.layer import MoESpec


class MoesaicConfig(PreTrainedConfig):
    """Configuration of a moesaic model.

    Attributes that are not defined here (`hidden_size`, `vocab_size`, `use_cache`, ...) are read from and written to
    the backbone's config, so code that expects a decoder's config works on this one.

    Args:
        backbone: config of the stock decoder whose feed-forward networks are replaced, or its dict.
        moe: `MoESpec` as a dict, or the object itself.
        output_router_logits: return router logits by default.
    """

    model_type = "moesaic"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "backbone": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "aux_losses", "router_logits", "routing"]

    backbone: dict | PreTrainedConfig | None = None
    moe: dict | None = None
    output_router_logits: bool = False
    tie_word_embeddings: bool | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.moe, MoESpec):
            self.moe = self.moe.to_dict()
        super().__post_init__(**kwargs)
        for name in ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "dtype"):
            if getattr(self, name, None) is None:
                setattr(self, name, getattr(self.backbone, name, None))

    @property
    def spec(self) -> MoESpec:
        """The description of the MoE layers, validated.

        Raises:
            ConfigError: if the `moe` section is missing or invalid.
        """
        return MoESpec.from_dict(self.moe or {}, where="moe")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The backbone's config, which describes the decoder."""
        return self.backbone  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        # Only while complete: transformers probes attributes during construction and unpickling.
        if not name.startswith("_") and "_post_init_done" in self.__dict__:
            return getattr(self.__dict__["backbone"], name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        backbone = self.__dict__.get("backbone") if "_post_init_done" in self.__dict__ else None
        if backbone is None or hasattr(type(self), name) or not hasattr(backbone, name) or name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(backbone, name, value)
