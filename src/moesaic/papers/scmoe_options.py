"""What the SCMoE reproduction measures: the `measure` section of its sizes, and what follows from the model."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from transformers import PreTrainedModel

from moesaic.configuration import Config
from moesaic.errors import ConfigError
from moesaic.trace.facts import facts_of

MANY_PICKS = 4
"""Models that are trained with so many picks or more get weak passes with fewer experts in place of single ranks, as
DeepSeekMoE does in the paper (appendix C)."""


class MeasureOptions(Config):
    """How much is measured, and over which settings.

    Attributes:
        problems: of the test split; what the page reports is measured on them, once.
        dev: problems of the split on which settings are chosen.
        tasks: JSONL files of generated answers (docs/tasks.md) in place of our problems, shuffled by the seed; the first
            `dev` items choose settings, the next `problems` are the test split, or as many as there are.
        demonstrations: worked problems in front of each of ours, for models that were not trained on them.
        max_new_tokens: most tokens of an answer to one of our problems.
        batch_size: rows in a batch.
        experts: numbers of experts of ensemble routing; None for 1 to 8 and the trained number.
        weak: routings of the weak pass that are tried; None for ranks 1 to 8 and a random expert, or for 1, 2 and 3 experts
            where the model is trained with 4 picks or more.
        ranks: ranks whose distance from the strong pass is measured; a random expert is measured beside them.
        betas: strengths that are tried.
        alpha: of the plausibility mask.
        stronger: numbers of experts of a stronger strong pass, beyond the trained one.
        dynamic: thresholds of dynamic routing.
        penalties: of contrastive search.
        candidates: tokens that contrastive search chooses among.
        amateur: checkpoint of contrastive decoding's second model: the step of one of the arm's own, or the folder of a
            model; None for no contrastive decoding.
        samples: of each problem, for votes.
        voted: problems that are sampled, the first of the test split.
        votes: numbers of samples that vote.
        temperature: of plain samples.
        compared: problems on whose greedy answers the passes are compared.
        latency_tokens: tokens generated to measure time; 0 measures none.
        latency_batches: rows in a batch when time is measured.
        latency_repeats: interleaved repeats, of which the median counts.
    """

    problems: PositiveInt = 400
    dev: PositiveInt = 200
    tasks: tuple[str, ...] = ()
    demonstrations: NonNegativeInt = 0
    max_new_tokens: PositiveInt = 48
    batch_size: PositiveInt = 100
    experts: tuple[PositiveInt, ...] | None = None
    weak: tuple[str, ...] | None = Field(default=None, min_length=1)
    ranks: PositiveInt = 8
    betas: tuple[PositiveFloat, ...] = Field(default=(0.1, 0.3, 0.5), min_length=1)
    alpha: float = Field(default=0.1, gt=0, le=1)
    stronger: tuple[PositiveInt, ...] = (1, 2)
    dynamic: tuple[PositiveFloat, ...] = (0.3, 0.4, 0.5, 0.6)
    penalties: tuple[PositiveFloat, ...] = (0.3, 0.4, 0.5, 0.6)
    candidates: PositiveInt = 5
    amateur: PositiveInt | str | None = None
    samples: PositiveInt = 10
    voted: PositiveInt = 400
    votes: tuple[PositiveInt, ...] = (1, 5, 10)
    temperature: PositiveFloat = 0.7
    compared: PositiveInt = 200
    latency_tokens: NonNegativeInt = 24
    latency_batches: tuple[PositiveInt, ...] = Field(default=(1,), min_length=1)
    latency_repeats: PositiveInt = 5

    @model_validator(mode="after")
    def _votes_fit(self) -> MeasureOptions:
        if self.votes and max(self.votes) > self.samples:
            raise ConfigError(
                "votes", self.votes, f"ask for more than the {self.samples} samples", "draw as many samples"
            )
        return self


@dataclass(frozen=True)
class Routed:
    """What is known of a model's routing.

    Attributes:
        experts: N, of the layer with the fewest.
        picks: K, that it was trained with.
    """

    experts: int
    picks: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Routed:
        """That of a MoE model, ours or stock.

        Raises:
            UnsupportedModel: if it has no MoE layer, or its routing can't be read.
        """
        layers = [layer for layer in facts_of(model).layers.values() if layer.selects]
        return cls(min(layer.num_experts for layer in layers), min(layer.top_k for layer in layers))

    def numbers(self, options: MeasureOptions) -> tuple[int, ...]:
        """Numbers of experts of ensemble routing, the trained one among them."""
        wanted = range(1, 9) if options.experts is None else options.experts
        return tuple(sorted({number for number in (*wanted, self.picks) if number <= self.experts}))

    def ranks(self, options: MeasureOptions) -> tuple[str, ...]:
        """Routings of a single expert, by rank, and a random one."""
        return (*(f"rank={rank}" for rank in range(1, min(options.ranks, self.experts) + 1)), "random=1")

    def weak(self, options: MeasureOptions) -> tuple[str, ...]:
        """Routings of the weak pass that are tried."""
        if options.weak is not None:
            return options.weak
        return ("k=1", "k=2", "k=3") if self.picks >= MANY_PICKS else self.ranks(options)

    def stronger(self, options: MeasureOptions) -> tuple[str, ...]:
        """Routings of a stronger strong pass."""
        return tuple(f"k={self.picks + more}" for more in options.stronger if self.picks + more <= self.experts)
