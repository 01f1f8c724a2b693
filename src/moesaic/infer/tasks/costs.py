"""What decodings cost for each new token: seconds beside the first one's, positions, and weights read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from moesaic.errors import ConfigError
from moesaic.infer.consistency.decoding import PromptBatch
from moesaic.infer.consistency.sample import check_inputs, encode
from moesaic.infer.consistency.spec_decoding import SpecDecoding
from moesaic.infer.decode import DecodingSpec, Work, count_work
from moesaic.infer.decode.row_sampler import row_seed


@dataclass(frozen=True)
class CostSettings:
    """How costs are measured.

    Attributes:
        prompts: so many of the tasks' prompts are continued, one at a time.
        tokens: new tokens of each, whatever the model would end at; fewer if it has not enough positions.
        repeats: timed rounds over all prompts and decodings, in turn forwards and backwards.
        timed: measure seconds too.
    """

    prompts: int = 3
    tokens: int = 32
    repeats: int = 3
    timed: bool = True

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("tokens", 2), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ConfigError(name, getattr(self, name), f"is below {least}", f"choose {least} or more")


USUAL_COST = CostSettings()


@dataclass(frozen=True)
class Cost:
    """What a new token after the first costs, one prompt at a time; what the prompt costs is left out.

    Attributes:
        positions: tokens that go through a model: 1 of greedy decoding, 2 with a weak pass.
        passes: forward passes.
        weight_bytes: that are read, by the model of `moesaic.infer.decode.pass_bytes`.
        experts_per_layer: distinct experts that a pass reads in an MoE layer.
        bytes_ratio: `weight_bytes` over that of the first decoding.
        seconds: median; None if not timed.
        time_ratio: median over prompts and rounds of the seconds over those of the first decoding, on the same prompt in
            the same round; None if not timed.
        time_low: its lower quartile.
        time_high: its upper quartile.
    """

    positions: float
    passes: float
    weight_bytes: float
    experts_per_layer: float
    bytes_ratio: float
    seconds: float | None = None
    time_ratio: float | None = None
    time_low: float | None = None
    time_high: float | None = None


def measure_costs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    decodings: Sequence[DecodingSpec],
    settings: CostSettings | None = None,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Cost]:
    """Measure decodings beside each other.

    Args:
        model: as for `evaluate_task`.
        tokenizer: its own.
        prompts: of which `settings.prompts` are taken, evenly.
        decodings: the first is what others are compared with.
        settings: how.
        seed: of sampling.
        progress: called with the number of runs done since the last call, of `runs_of`.

    Raises:
        ConfigError: if the model has no positions for new tokens.
    """
    settings, tell = settings or CostSettings(), progress or (lambda done: None)
    check_inputs(model)
    chosen = _spread(prompts, settings.prompts)
    runs = [_Run(model, tokenizer, prompt, settings.tokens, seed) for prompt in chosen]
    works: list[Work] = []
    for spec in decodings:
        amateur = getattr(spec.strategy, "amateur_model", None)
        with count_work(*(found for found in (model, amateur) if found is not None)) as count:
            counted = [run(spec, lambda: count.work) for run in runs]
        works.append(sum((found.work for found in counted), Work()).scaled(1 / len(runs)))
        tell(len(runs))
    seconds: list[list[float]] = [[] for _ in decodings]
    for number in range(settings.repeats if settings.timed else 0):
        for run in runs:
            for place in range(len(decodings))[:: -1 if number % 2 else 1]:
                seconds[place].append(run(decodings[place]).seconds)
                tell(1)
    return [
        Cost(
            work.positions,
            work.passes,
            work.weight_bytes,
            work.experts_per_layer,
            work.weight_bytes / works[0].weight_bytes,
            **_times(own, seconds[0]),
        )
        for work, own in zip(works, seconds, strict=True)
    ]


def runs_of(settings: CostSettings, prompts: int, decodings: int) -> int:
    """How many continuations `measure_costs` makes."""
    rounds = 1 + settings.repeats * settings.timed
    return rounds * min(settings.prompts, prompts) * decodings


@dataclass(frozen=True)
class _PerToken:
    seconds: float
    work: Work


@dataclass
class _Watch(StoppingCriteria):
    """Looks at the clock and the counts after every step; it ends nothing."""

    work: Callable[[], Work]
    readings: list[tuple[int, float, Work]] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.readings.append((input_ids.shape[1], time.perf_counter(), self.work()))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _Run:
    """Continues one prompt."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int, seed: int
    ) -> None:
        self._model = model
        ids = encode(tokenizer, prompt)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._tokens = tokens if positions is None else min(tokens, positions - len(ids))
        if self._tokens < 2:
            raise ConfigError(
                "prompt", f"{len(ids)} tokens", f"leaves no room for new ones in {positions} positions", "shorten it"
            )
        self._ids_1S = torch.tensor([ids], device=model.device)
        self._seed = row_seed(seed, prompt, 0)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._pad = 0 if pad is None else int(pad)  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(self, spec: DecodingSpec, work: Callable[[], Work] = Work) -> _PerToken:
        """What a token after the first takes."""
        watch = _Watch(work)
        batch = PromptBatch(
            self._ids_1S,
            torch.ones_like(self._ids_1S),
            (self._seed,),
            self._tokens,
            StoppingCriteriaList([watch]),
            self._pad,
        )
        training = self._model.training
        self._model.eval()
        try:
            SpecDecoding(spec, min_new_tokens=self._tokens)(self._model, batch)
        finally:
            self._model.train(training)
        (start, begun, before), (end, ended, after) = watch.readings[0], watch.readings[-1]
        if end == start:
            raise ConfigError(
                "decode", spec.label, "made a single token, of which nothing can be measured", "switch cost off"
            )
        return _PerToken((ended - begun) / (end - start), (after - before).scaled(1 / (end - start)))


def _spread(prompts: Sequence[str], wanted: int) -> list[str]:
    """So many of them, evenly."""
    count = min(wanted, len(prompts))
    return [prompts[place * len(prompts) // count] for place in range(count)]


def _times(own: Sequence[float], first: Sequence[float]) -> dict[str, float]:
    if not own:
        return {}
    ratios = sorted(mine / other for mine, other in zip(own, first, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"seconds": statistics.median(own), "time_ratio": middle, "time_low": low, "time_high": high}
