"""Self-contrast: a model's own routing set against a weaker routing of the same model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from moesaic.errors import ConfigError, UnsupportedOverride
from moesaic.hf.generation_view import generate_with
from moesaic.infer.decode.contrast import (
    ContrastProcessor,
    EndedRows,
    EosBan,
    Passes,
    Strength,
    TwoPasses,
    TwoRows,
    contrast,
    with_contrast,
)
from moesaic.infer.decode.decodings.base import DecodingStrategy
from moesaic.infer.decode.overrides import OverrideLike, OverrideSpec, RoutingSwitch

Plan = Literal["two_rows", "two_passes"]
_PLANS: dict[Plan, type[TwoRows | TwoPasses]] = {"two_rows": TwoRows, "two_passes": TwoPasses}


class SelfContrast(DecodingStrategy):
    """Self-contrast decoding of a mixture of experts (SCMoE, arXiv 2405.14507, equations 4 to 6).

        model.generate(**inputs, custom_generate=moesaic.SelfContrast(beta=0.5))

    A strong pass, with the model's own routing, and a weak one, with the second expert alone, read the same tokens, each with
    hidden states and a cache of its own, from the first token of the prompt on. The next token is taken from (1 + beta) strong
    - beta weak among tokens that the strong pass finds plausible. Greedy, sampling and beam search are those of transformers:
    penalties and bans of tokens act on the strong logits, temperature, top-k and top-p on the contrast, beams add up the
    logarithm of its softmax.

    Attributes:
        weak: routing of the weak pass; see docs/routing-overrides.md. Its weights follow the router's own rule, 1 for `rank=2`
            where the router normalises; `rank=2+total=1` is equation 4 for every router.
        strong: routing of the strong pass; none is the model's own.
        alpha: a token is plausible with at least this share of the likeliest token's probability; in (0, 1].
        beta: strength; 0 is decoding without contrast, among plausible tokens. The paper's best single value is about 0.3;
            0.5 for reasoning, 0.1 to 0.3 for code.
        plan: "two_rows" runs both passes as rows of one batch, which reads shared weights once; "two_passes" one after the
            other. They give the same tokens.
        eos_ban: rule out the end of the sequence: "before_mask", or after it as the published code does ("official"), which
            can leave no token at all and is then an error. None lets sequences end.
        strong_temperature: strong logits are divided by it, before the mask.
        weak_temperature: weak logits are divided by it.
    """

    has_weak_pass: ClassVar = True
    presets: ClassVar = {"reasoning": {"beta": 0.5}, "code": {"beta": 0.1}}
    unscored: ClassVar = ("alpha", "eos_ban")

    type: Literal["self_contrast"] = "self_contrast"
    weak: OverrideSpec = Field(default_factory=lambda: OverrideSpec.of("rank=2"))
    strong: OverrideSpec = OverrideSpec()
    alpha: float = Field(default=0.1, gt=0, le=1)
    beta: float = Field(default=0.3, ge=0)
    plan: Plan = "two_rows"
    eos_ban: EosBan | None = None
    strong_temperature: float = Field(default=1.0, gt=0)
    weak_temperature: float = Field(default=1.0, gt=0)

    @field_validator("weak", "strong", mode="before")
    @classmethod
    def _routing(cls, value: OverrideLike) -> OverrideSpec:
        return OverrideSpec.of(value)

    @property
    def strength(self) -> Strength:
        """The settings of the contrast."""
        return Strength(self.alpha, self.beta, self.strong_temperature, self.weak_temperature, self.eos_ban)

    def logits(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """See `DecodingStrategy`: (1 + beta) strong - beta weak, after the temperatures of both, without the mask of `alpha`.

        The passes run one after the other, whatever the plan.

        Raises:
            MoesaicError: as in decoding.
        """
        switch = RoutingSwitch(model)
        strong, weak = switch.prepare(self.strong), switch.prepare(self.weak)
        with switch.entered():
            with switch.acting(strong):
                strong_BSV = model(**inputs).logits
            with switch.acting(weak):
                weak_BSV = model(**inputs).logits
        return contrast(strong_BSV / self.strong_temperature, weak_BSV / self.weak_temperature, alpha=0, beta=self.beta)

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
            UnsupportedModel: if the model has no MoE layer, or its routing can't be read.
            UnsupportedOverride: if a router can't honour a routing.
            ConfigError: if a routing does not fit the model, or `generate` was asked for what can't be combined with this.
        """
        return SelfContrastRows(rows=(self,))(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus,
            streamer,
            **model_kwargs,
        )


class SelfContrastRows(DecodingStrategy):
    """Self-contrast with settings of its own for each prompt of a batch, or none.

    Attributes:
        rows: for each prompt, or one for all; None decodes it plainly, without a weak pass. All have the same plan.
    """

    type: Literal["self_contrast_rows"] = "self_contrast_rows"
    rows: tuple[SelfContrast | None, ...] = Field(min_length=1)

    @field_validator("rows")
    @classmethod
    def _one_plan(cls, rows: tuple[SelfContrast | None, ...]) -> tuple[SelfContrast | None, ...]:
        plans = sorted({row.plan for row in rows if row is not None})
        if len(plans) > 1:
            raise ConfigError("rows", plans, "have different plans", "give all of them the same")
        return rows

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
        """See `SelfContrast`."""
        rows = self._by_row(input_ids.shape[0])
        plans: list[Plan] = [row.plan for row in rows if row is not None]
        switch = RoutingSwitch(model)
        plan = plans[0] if plans else "two_passes"  # without weak passes one
        if plan == "two_rows" and switch.limited:
            raise UnsupportedOverride(
                f"plan='two_rows' can't run a model whose layer {min(switch.limited)} has a capacity, for which strong and weak "
                "rows of one batch would compete; use plan='two_passes'"
            )
        passes: Passes = _PLANS[plan](
            model,
            switch,
            [OverrideSpec() if row is None else row.strong for row in rows],
            [None if row is None else row.weak for row in rows],
        )
        eos = getattr(generation_config, "_eos_token_tensor", None)
        beams = (generation_config.num_beams or 1) > 1
        ending = EndedRows(stopping_criteria)
        contrasting = ContrastProcessor(
            passes,
            [None if row is None else row.strength for row in rows],
            [] if eos is None else eos.tolist(),
            log_probabilities=beams,
            ended=lambda: None if beams else ending.ended_B,
        )
        with switch.entered():
            found = generate_with(
                model,
                passes,
                input_ids,
                generation_config,
                logits_processor=with_contrast(logits_processor, contrasting),
                stopping_criteria=ending,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        cache = model_kwargs.get("past_key_values")
        if not getattr(cache, "_is_user_defined", False):
            cache = getattr(found, "past_key_values", None)
        if cache is not None and isinstance(passes, TwoRows):
            passes.leave_strong(cache)
        return found

    def _by_row(self, batch: int) -> Sequence[SelfContrast | None]:
        """The settings of each row; beams and sequences of a prompt stand together."""
        if batch % len(self.rows):
            raise ConfigError(
                "rows", len(self.rows), f"entries do not fit a batch of {batch} rows", "give one for each prompt"
            )
        return [row for row in self.rows for _ in range(batch // len(self.rows))]
