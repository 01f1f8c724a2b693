"""What decodings share: a config that `generate` of transformers can call."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from pydantic import model_validator
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)

from moesaic.configuration import Config
from moesaic.errors import ConfigError


class DecodingStrategy(Config, ABC):
    """One way to choose tokens, beside those of transformers: `model.generate(..., custom_generate=decoding)`.

    transformers (5.23) does not hand `streamer`, `tokenizer`, `synced_gpus` and `assistant_model` to a callable; use
    `decoding.generate(model, ...)` for these.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Values of fields for a purpose, by name: what `preset` in a mapping or a text stands for, where fields say nothing else."""
    samples: ClassVar[bool] = True
    """Whether a temperature means something. It is then drawn from the scores by transformers' loop."""
    searches: ClassVar[bool] = True
    """Whether several beams do."""
    alias: ClassVar[str | None] = None
    """What it is called in texts, beside its type."""
    has_weak_pass: ClassVar[bool] = False
    """Whether a second pass reads every token too."""
    unscored: ClassVar[Sequence[str]] = ()
    """Fields that `logits` has no use for."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "preset" not in values or "preset" in cls.model_fields:
            return values
        preset = values["preset"]
        if preset not in cls.presets:
            known = f"choose one of {', '.join(cls.presets)}" if cls.presets else "leave it out"
            raise ConfigError("preset", preset, "is not a preset", known)
        return {**cls.presets[preset], **{field: value for field, value in values.items() if field != "preset"}}

    @abstractmethod
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
        """Continue prompts; arguments and result are those of transformers' loops."""

    @property
    def companions(self) -> tuple[PreTrainedModel, ...]:
        """Other models that it runs.

        Raises:
            MoesaicError: if one can't be loaded.
        """
        return ()

    def logits(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """Next-token logits by this decoding at every place of given texts, whose softmax scores choices.

        No token is left out as implausible, so that every text has a likelihood.

        Args:
            model: as for `generate`.
            inputs: of a forward pass without a cache.

        Returns:
            (B, S, V); of the last places only where `inputs` ask for that.

        Raises:
            ConfigError: if the decoding does not say likelihoods.
        """
        raise ConfigError(
            "decode",
            str(getattr(self, "type", type(self).__name__)),
            "does not score given texts",
            "generate answers with it",
        )

    def generate(self, model: PreTrainedModel, inputs: Tensor | None = None, **given: Any) -> Any:
        """`model.generate` with this decoding, and with a streamer and stop strings where they are given.

        Args:
            model: any causal language model that the decoding can run.
            inputs: as for `model.generate`.
            **given: all its other arguments.

        Raises:
            ConfigError: for an argument that can't be honoured.
        """
        for name, remedy in (
            ("assistant_model", "decode without one"),
            ("custom_generate", "call that one's `generate`"),
        ):
            if given.pop(name, None) is not None:
                raise ConfigError(name, "given", f"does not go with {type(self).__name__}", remedy)
        bound = {name: given.pop(name) for name in ("streamer", "synced_gpus") if given.get(name) is not None}
        given = _with_stop_strings(model, given)
        if "streamer" in bound:
            given["streamer"] = bound["streamer"]  # it gets the prompt from `generate`, and tokens from the loop
        return cast(Any, model).generate(inputs, custom_generate=functools.partial(self, **bound), **given)


def _with_stop_strings(model: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a criterion in the place of strings, which `generate` can't make without the tokenizer."""
    tokenizer = given.pop("tokenizer", None)
    config = given.get("generation_config") or model.generation_config
    strings = given.pop("stop_strings", None) or getattr(config, "stop_strings", None)
    if strings is None:
        return given
    if tokenizer is None:
        raise ConfigError("tokenizer", None, "is missing, and stop_strings need it", "give the model's tokenizer")
    config = copy.deepcopy(config)
    config.stop_strings = None
    criteria = [*(given.get("stopping_criteria") or []), StopStringCriteria(tokenizer, strings)]
    return {**given, "generation_config": config, "stopping_criteria": StoppingCriteriaList(criteria)}
