"""Contrastive decoding: a model set against a weaker one, the amateur."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_serializer, field_validator
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from moesaic.errors import ConfigError
from moesaic.files import is_local
from moesaic.hf.generation_view import generate_with
from moesaic.infer.decode.contrast import (
    ContrastProcessor,
    Strength,
    TwoModels,
    check_vocabularies,
    contrast,
    difference,
    with_contrast,
)
from moesaic.infer.decode.decodings.base import DecodingStrategy


class ContrastiveDecoding(DecodingStrategy):
    """Contrastive decoding with an amateur model (arXiv 2309.09117, section 2; 2210.15097, section 3).

        model.generate(**inputs, custom_generate=ContrastiveDecoding(amateur="path/to/a/smaller/model"))

    Both models read the same tokens, each with a cache of its own. The next token is taken from (1 + beta) expert - beta
    amateur among tokens that the expert finds plausible. Greedy, sampling and beam search are those of transformers:
    penalties and bans of tokens act on the expert's logits, temperature, top-k and top-p on the contrast.

    Attributes:
        amateur: a causal language model with the same tokenizer, of any family, or its folder, which is loaded once, in the
            dtype it is saved in, on the device of the model that generates.
        alpha: a token is plausible with at least this share of the likeliest token's probability; in (0, 1].
        beta: strength, 0 or more; 0.5 is that of 2309.09117. None takes log p_expert - log p_amateur alone (2210.15097).
        amateur_temperature: the amateur's logits are divided by it; 2210.15097 uses 0.5 for GPT-2 and 1 for OPT.
    """

    unscored: ClassVar = ("alpha",)
    has_weak_pass: ClassVar = True

    type: Literal["contrastive"] = "contrastive"
    amateur: Any
    alpha: float = Field(default=0.1, gt=0, le=1)
    beta: float | None = Field(default=0.5, ge=0)
    amateur_temperature: float = Field(default=1.0, gt=0)

    @field_validator("amateur", mode="before")
    @classmethod
    def _model_or_folder(cls, value: Any) -> str | PreTrainedModel:
        if isinstance(value, PreTrainedModel) or (isinstance(value, str) and value):
            return value
        if isinstance(value, Path):
            return str(value)
        raise ConfigError("amateur", value, "is no model", "give a causal language model, or its folder")

    @field_serializer("amateur")
    def _folder(self, value: str | PreTrainedModel) -> str:
        name = value if isinstance(value, str) else value.name_or_path
        if not name:
            raise ConfigError("amateur", type(value).__name__, "was never saved", "give the folder of a saved model")
        return name

    @cached_property
    def amateur_model(self) -> PreTrainedModel:
        """The amateur itself.

        Raises:
            ConfigError: if there is no such folder.
            CheckpointError: if its files are damaged.
        """
        if not isinstance(self.amateur, str):
            return self.amateur
        if is_local(self.amateur) and not Path(self.amateur).expanduser().is_dir():
            raise ConfigError("amateur", self.amateur, "is not a folder", "give that of a saved causal language model")
        # Training brings much that decoding does not need.
        from moesaic.train.load import load_model

        return load_model(self.amateur, dtype="auto").eval()

    @property
    def companions(self) -> tuple[PreTrainedModel, ...]:
        """The amateur."""
        return (self.amateur_model,)

    def _beside(self, model: PreTrainedModel) -> PreTrainedModel:
        amateur = self.amateur_model
        if isinstance(self.amateur, str):
            amateur.to(model.device)  # type: ignore[arg-type]
        return amateur

    def logits(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """See `DecodingStrategy`: the contrast of expert and amateur, without the mask of `alpha`.

        Raises:
            MoesaicError: as in decoding.
        """
        amateur = self._beside(model)
        check_vocabularies(model, amateur)
        strong_BSV = model(**inputs).logits
        read = {name: inputs[name].to(amateur.device) for name in ("input_ids", "attention_mask") if name in inputs}
        weak_BSV = amateur(**read, use_cache=False).logits[:, -strong_BSV.shape[1] :].to(strong_BSV)
        weak_BSV = weak_BSV / self.amateur_temperature
        if self.beta is None:
            return difference(strong_BSV, weak_BSV, alpha=0)
        return contrast(strong_BSV, weak_BSV, alpha=0, beta=self.beta)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """See `DecodingStrategy`.

        Raises:
            ConfigError: if the amateur's folder is missing, its vocabulary has another size, or `generate` was asked for what
                can't be combined with this.
            CheckpointError: if the amateur's files are damaged.
            UnsupportedModel: if the amateur is no decoder with a cache.
        """
        passes = TwoModels(model, self._beside(model), model_kwargs.get("attention_mask"))
        strength = Strength(self.alpha, self.beta, weak_temperature=self.amateur_temperature)
        contrasting = ContrastProcessor(
            passes, [strength] * len(input_ids), [], log_probabilities=(generation_config.num_beams or 1) > 1
        )
        return generate_with(
            model,
            passes,
            input_ids,
            generation_config,
            logits_processor=with_contrast(logits_processor, contrasting),
            stopping_criteria=stopping_criteria,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
