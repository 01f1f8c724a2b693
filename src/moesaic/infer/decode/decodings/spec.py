"""A decoding as data: a strategy, how tokens are drawn from its scores, and a routing; from a text, YAML or objects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, cast, get_args

from pydantic import Field, field_validator, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.configuration import Config, read_yaml
from moesaic.errors import ConfigError
from moesaic.infer.decode.decodings.base import DecodingStrategy
from moesaic.infer.decode.decodings.contrastive import ContrastiveDecoding
from moesaic.infer.decode.decodings.contrastive_search import ContrastiveSearch
from moesaic.infer.decode.decodings.early_exit import EarlyExitContrast
from moesaic.infer.decode.decodings.self_contrast import SelfContrast
from moesaic.infer.decode.decodings.text import FIELD, expanded, own_values, text_name, text_of, values_of_text
from moesaic.infer.decode.overrides import OverrideLike, OverrideSpec, override_routing

Strategy = SelfContrast | ContrastiveDecoding | EarlyExitContrast | ContrastiveSearch
# What generation configs of models may say about sampling, at values that do nothing.
_OFF: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0, "eta_cutoff": 0}

_DRAWING = ("temperature", "top_p", "top_k", "min_p", "num_beams")


class DecodingSpec(Config):
    """How a model decodes.

        spec = DecodingSpec.of("self-contrast beta=0.5 temperature=0.7")
        spec.generate(model, **inputs)

    Attributes:
        strategy: where scores come from; None for the model's own.
        temperature: 0 takes the token with the highest score.
        top_p: sample from the smallest set of tokens with this probability; 1 is off.
        top_k: sample from so many tokens; 0 is off.
        min_p: sample from tokens with at least this share of the likeliest one's probability; 0 is off.
        num_beams: beam search with so many; with a temperature it samples.
        override: routing of the whole decoding; parts of the strategy that route otherwise act inside of it. Anything that
            `OverrideSpec.of` takes.
    """

    strategy: Annotated[Strategy, Field(discriminator="type")] | None = None
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    num_beams: int = Field(default=1, ge=1)
    override: OverrideSpec = OverrideSpec()

    @field_validator("override", mode="before")
    @classmethod
    def _routing(cls, value: OverrideLike) -> OverrideSpec:
        return OverrideSpec.of(value)

    @field_validator("temperature", mode="before")
    @classmethod
    def _no_temperature(cls, value: Any) -> Any:
        return 0.0 if value is None else value

    @model_validator(mode="after")
    def _every_field_is_used(self) -> Self:
        for name in ("top_p", "top_k", "min_p"):
            value = getattr(self, name)
            if not self.temperature and value != type(self).model_fields[name].default:
                raise ConfigError(
                    name, value, "is for sampling, and the temperature is 0", "set one, or leave this out"
                )
        if self.strategy is not None:
            called = text_name(type(self.strategy))
            if self.temperature and not self.strategy.samples:
                raise ConfigError("temperature", self.temperature, f"does not go with {called}", "leave it out")
            if self.num_beams > 1 and not self.strategy.searches:
                raise ConfigError("num_beams", self.num_beams, f"does not go with {called}", "leave it out")
        return self

    @classmethod
    def of(cls, given: DecodingLike, **options: Any) -> DecodingSpec:
        """From anything that says one: a spec, a strategy, a mapping, a short text, or the path of a YAML file.

        Args:
            given: as a text a name (`greedy`, `sample`, `beam` or a strategy's, as `self-contrast`) and fields, those of the
                strategy and those here: `self-contrast weak=rank=3 beta=0.5 temperature=0.7`. `sample` has temperature 1
                unless it says another, `beam` 4 beams.
            **options: fields of a spec from elsewhere, None where there is none. They fill in what `given` leaves open.

        Raises:
            ConfigError: naming the field that is wrong, or the option that says something else than `given`.
        """
        values, implied = _values(given)
        for name, value in options.items():
            if value is None:
                continue
            if name in values and not _equal(values[name], value):
                raise ConfigError(
                    name, value, f"is another than that of the decoding, {values[name]}", "leave one of the two out"
                )
            values[name] = value
        return cls.from_dict({**implied, **values}, where=FIELD)

    @classmethod
    def grid_of(cls, given: DecodingLike | Sequence[DecodingLike], **options: Any) -> list[DecodingSpec]:
        """As `of`, for texts with braces: `self-contrast weak=rank={1,2,3} beta={0.1,0.3}`, `greedy override=k={1..8}`.

        Returns:
            A spec for each choice of all braces, the last of which changes first. Several texts give their specs in turn.

        Raises:
            ConfigError: see `of`; for braces that can't be read.
        """
        if isinstance(given, str):
            return [cls.of(text, **options) for text in expanded(given)]
        if isinstance(given, Sequence):
            return [spec for one in given for spec in cls.grid_of(one, **options)]
        return [cls.of(given, **options)]

    @property
    def text(self) -> str:
        """The shortest text that says this: `DecodingSpec.of(spec.text)` equals it.

        Raises:
            ConfigError: for an override that no text says: settings of a replayed trace, or one in memory.
        """
        fields = self._drawing
        if self.override.parts:
            fields["override"] = self.override
        if self.strategy is not None:
            return text_of(text_name(type(self.strategy)), {**own_values(self.strategy), **fields})
        return text_of("beam" if self.num_beams > 1 else "sample" if self.temperature else "greedy", fields)

    @property
    def _drawing(self) -> dict[str, Any]:
        """What is said of how tokens are drawn."""
        given = {name: getattr(self, name) for name in _DRAWING}
        return {name: value for name, value in given.items() if value != type(self).model_fields[name].default}

    @property
    def label(self) -> str:
        """The text, or JSON where no text says this."""
        try:
            return self.text
        except ConfigError:
            return self.model_dump_json(exclude_defaults=True)

    @property
    def options(self) -> dict[str, Any]:
        """Fields of a `GenerationConfig` that say the sampling here, whatever the model's own config has."""
        options: dict[str, Any] = {"do_sample": self.temperature > 0, "num_beams": self.num_beams}
        if self.temperature:
            options |= _OFF | {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        return options

    @contextlib.contextmanager
    def routing(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside this block `model` has the routing of `override`.

        Raises:
            MoesaicError: see `moesaic.override_routing`.
        """
        with override_routing(model, self.override) if self.override.parts else contextlib.nullcontext():
            yield

    def logits(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """Next-token logits at every place of given texts, for likelihoods of choices: those of the strategy, or the model's own,
        with the routing here. Temperatures and beams are for generating.

        Args:
            model: as for `generate`.
            inputs: of a forward pass without a cache.

        Raises:
            ConfigError: if the strategy does not say likelihoods.
            MoesaicError: as for `generate`.
        """
        with self.routing(model):
            return model(**inputs).logits if self.strategy is None else self.strategy.logits(model, inputs)

    def check_used(self, *, generated: bool, scored: bool) -> None:
        """Check that every field is of use.

        Args:
            generated: whether texts are generated.
            scored: whether likelihoods of choices are asked for.

        Raises:
            ConfigError: for the first that would be read by nothing.
        """
        if generated or not scored:
            return
        strategy = {} if self.strategy is None else own_values(self.strategy)
        unscored = () if self.strategy is None else self.strategy.unscored
        for name, value in {**self._drawing, **{name: strategy[name] for name in unscored if name in strategy}}.items():
            raise ConfigError(
                f"{FIELD}.{name}", value, "is for generated answers, and all are multiple choice", "leave it out"
            )

    @property
    def companions(self) -> tuple[PreTrainedModel, ...]:
        """Other models that the strategy runs.

        Raises:
            MoesaicError: if one can't be loaded.
        """
        return () if self.strategy is None else self.strategy.companions

    def generate(self, model: PreTrainedModel, inputs: Tensor | None = None, **given: Any) -> Any:
        """`model.generate` with this decoding.

        Args:
            model: any causal language model that the strategy and the override can run.
            inputs: as for `model.generate`.
            **given: its other arguments, `streamer` and `stop_strings` among them, but for what is set here.

        Raises:
            ConfigError: for an argument that is set here, or can't be honoured.
            MoesaicError: see the strategy and `moesaic.override_routing`.
        """
        for name in self.options.keys() | _OFF.keys() | {"temperature"}:
            if given.get(name) is not None:
                raise ConfigError(name, given[name], "is set by the decoding", f"say it there, as in '{self.text}'")
        given |= self.options
        with self.routing(model):
            if self.strategy is not None:
                return self.strategy.generate(model, inputs, **given)
            return cast(Any, model).generate(inputs, **given)


DecodingLike = DecodingSpec | DecodingStrategy | Mapping[str, Any] | str | Path


def _values(given: DecodingLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that are said, and those that follow where nothing else is said."""
    if isinstance(given, DecodingSpec):
        return {name: getattr(given, name) for name in given.model_fields_set}, {}
    if isinstance(given, DecodingStrategy):
        return {"strategy": given}, {}
    if isinstance(given, Path) or (isinstance(given, str) and given.endswith((".yaml", ".yml")) and " " not in given):
        return read_yaml(given), {}
    if isinstance(given, str):
        shared = [name for name in DecodingSpec.model_fields if name != "strategy"]
        return values_of_text(given, get_args(Strategy), shared)
    if isinstance(given, Mapping):
        return dict(given), {}
    raise ConfigError(FIELD, given, "says no decoding", "give a text such as 'greedy', or the path of a YAML file")


def _equal(said: Any, option: Any) -> bool:
    try:
        return float(said) == float(option)
    except (TypeError, ValueError):
        return said == option
