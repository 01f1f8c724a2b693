"""DoLa: a model set against one of its own earlier layers."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from moesaic.errors import ConfigError
from moesaic.hf.early_exit import has_tied_head, num_layers
from moesaic.hf.generation_view import generate_with
from moesaic.infer.decode.contrast import ContrastProcessor, Divergence, EarlyExit, Strength, with_contrast
from moesaic.infer.decode.decodings.base import DecodingStrategy

# Of deeper models the buckets have no more than this many layers from either end.
_DEEP, _BUCKET = 40, 20


class EarlyExitContrast(DecodingStrategy):
    """Decoding by contrasting layers (DoLa, arXiv 2309.03883, section 2).

        model.generate(**inputs, repetition_penalty=1.2, custom_generate=EarlyExitContrast(layers="low"))

    The head reads the hidden state of earlier layers too. At every token each row picks the candidate layer whose next-token
    distribution is farthest from the last layer's, and the next token is taken by log p_last - log p_early among tokens that
    the last layer finds plausible. It costs one pass and a product with the head for each candidate. Greedy, sampling and beam
    search are those of transformers. Bans of tokens act before the contrast, so that some token is always left; the penalty
    for repetition acts on the contrast, as published, and the paper recommends 1.2.

    A row picks its layer by itself. The implementation of transformers takes one layer for the batch, by the mean over its
    rows, so that a text depends on its company; for one prompt both are the same.

    Attributes:
        layers: candidates: "low" or "high", every second layer of the lower or upper half (of the 20 lowest or highest in
            models of more than 40 layers), or their numbers, where 0 is the token embedding and 1 the first layer's output;
            more than one is picked from by divergence. The paper uses "low" for long reasoning, "high" for short answers.
            "low" starts at layer 2 where head and embedding are tied, as the embedding itself would give its own token back.
        alpha: a token is plausible with at least this share of the likeliest token's probability; in (0, 1].
        normalise: apply the final norm to earlier layers' hidden states before the head. Paper and published code don't.
        divergence: see `moesaic.infer.decode.contrast.distance`; "official" for the tokens of the published code.
    """

    alias: ClassVar = "dola"

    type: Literal["early_exit"] = "early_exit"
    layers: Literal["low", "high"] | tuple[int, ...] = "low"
    alpha: float = Field(default=0.1, gt=0, le=1)
    normalise: bool = False
    divergence: Divergence = "jensen_shannon"

    @field_validator("layers")
    @classmethod
    def _some(cls, value: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if not value or (not isinstance(value, str) and (min(value) < 0 or len(set(value)) < len(value))):
            raise ConfigError("layers", value, "are no candidates", "give 'low', 'high' or different numbers from 0")
        return value

    def candidates(self, model: PreTrainedModel) -> tuple[int, ...]:
        """The candidate layers of a model.

        Raises:
            ConfigError: if it has no such layer.
        """
        last = num_layers(model)
        if not isinstance(self.layers, str):
            if max(self.layers) >= last:
                raise ConfigError(
                    "layers",
                    self.layers,
                    f"are not all before the last of {last}",
                    f"give numbers from 0 to {last - 1}",
                )
            return self.layers
        if self.layers == "high":
            return tuple(range(last - _BUCKET if last > _DEEP else last // 2, last, 2))
        first = min(2, last - 1) if has_tied_head(model) else 0
        return tuple(range(first, _BUCKET if last > _DEEP else last // 2, 2)) or (first,)

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
            ConfigError: if the model has no such layer, or `generate` was asked for what can't be combined with this.
            UnsupportedModel: if earlier layers' logits can't be had.
        """
        passes = EarlyExit(model, self.candidates(model), normalise=self.normalise, divergence=self.divergence)
        contrasting = ContrastProcessor(
            passes,
            [Strength(self.alpha, None)] * len(input_ids),
            [],
            log_probabilities=(generation_config.num_beams or 1) > 1,
        )
        return generate_with(
            model,
            passes,
            input_ids,
            generation_config,
            logits_processor=with_contrast(logits_processor, contrasting, penalise_contrast=True),
            stopping_criteria=stopping_criteria,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )
