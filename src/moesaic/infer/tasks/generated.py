"""Items whose answer is found in generated text: one sample, a vote over several, or the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from moesaic.infer.consistency.best_of import best_of
from moesaic.infer.consistency.likelihood import likelihood_weights, mean_log_probability
from moesaic.infer.consistency.sample import Sample, Sampler
from moesaic.infer.consistency.self_consistency import self_consistency
from moesaic.infer.tasks.schema import GenerateItem

VoteRule = Literal["majority", "weighted", "best"]


def answer_texts(
    sampler: Sampler, items: Sequence[GenerateItem], *, samples: int = 1, rule: VoteRule = "majority"
) -> list[dict[str, Any]]:
    """What the model answers to items that share the sampler's stop texts and length.

    Args:
        sampler: draws samples.
        items: to answer.
        samples: of each item.
        rule: `majority`, `weighted` by the exponential of the mean log-probability, or the answer of the `best` sample by
            mean log-probability.

    Returns:
        For each item `correct`, `predicted` (None if all abstained), `right`, `shares` of the votes, `abstentions`,
        `samples` (`text`, `answer`, `ended`, `tokens`, and with `weighted` and `best` their `score`),
        `prompt_tokens`, `generated_tokens`, `scored_tokens` and `weak_tokens`.
    """
    prompts, scored = [item.prompt for item in items], rule != "majority" and samples > 1
    extractors = [item.extractor for item in items]
    answered = []
    if rule == "best" and scored:
        score = mean_log_probability(sampler.model, batch_size=sampler.batch_size)
        for item, extract, found in zip(
            items, extractors, best_of(sampler, prompts, score, samples=samples), strict=True
        ):
            answers = [extract(sample.text) for sample in found.samples]
            predicted = answers[found.sample.number]
            answered.append(_row(item, predicted, None, found.samples, answers, found.scores))
        return answered
    weigh = likelihood_weights(sampler.model, batch_size=sampler.batch_size) if scored else None
    votes = self_consistency(sampler, prompts, extractors, samples=samples, weigh=weigh, largest_weight=1.0)
    for item, found in zip(items, votes, strict=True):
        scores = found.weights if scored else None
        answered.append(_row(item, found.answer, found.vote.shares, found.samples, found.answers, scores))
    return answered


def _row(
    item: GenerateItem,
    predicted: str | None,
    shares: dict[str, float] | None,
    samples: Sequence[Sample],
    answers: Sequence[str | None],
    scores: Sequence[float] | None,
) -> dict[str, Any]:
    drawn: list[dict[str, Any]] = [
        {"text": sample.text, "answer": answer, "ended": sample.ended, "tokens": len(sample.ids)}
        for sample, answer in zip(samples, answers, strict=True)
    ]
    for row, score in zip(drawn, scores or (), strict=scores is not None):
        row["score"] = score
    generated = sum(len(sample.ids) for sample in samples)
    return {
        "correct": predicted in item.right,
        "predicted": predicted,
        "right": sorted(item.right),
        **({} if shares is None else {"shares": shares}),
        "abstentions": sum(answer is None for answer in answers),
        "samples": drawn,
        "prompt_tokens": sum(len(sample.prompt_ids) for sample in samples),
        "generated_tokens": generated,
        "scored_tokens": generated if scores is not None else 0,
        "weak_tokens": sum(sample.weak_tokens for sample in samples),
    }
