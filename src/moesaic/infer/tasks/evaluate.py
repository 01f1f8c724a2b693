"""Evaluation of a model on a task."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.errors import ConfigError, DataError
from moesaic.infer.consistency.decoding import Decoding, Generate
from moesaic.infer.consistency.likelihood import own_logits
from moesaic.infer.consistency.sample import Sampler, Usage
from moesaic.infer.consistency.self_consistency import check_samples
from moesaic.infer.consistency.spec_decoding import SpecDecoding
from moesaic.infer.tasks.choice import answer_choices
from moesaic.infer.tasks.generated import VoteRule, answer_texts
from moesaic.infer.tasks.load import Task
from moesaic.infer.tasks.results import ResultsFile, Row
from moesaic.infer.tasks.schema import ChoiceItem, GenerateItem, Item
from moesaic.infer.tasks.statistics import Accuracy, Paired, accuracy, compare

# Items between two writes of results, in batches.
_BATCHES = 4
Named = tuple[str, Item]


@dataclass(frozen=True)
class TaskResult:
    """How a model did.

    Attributes:
        task: name of the task.
        accuracy: with its 95 % interval.
        rows: of each item, in the order of the task.
        unanswered: generated items without an answer; they count as wrong.
        usage: tokens and seconds, those of an earlier part of the run included.
    """

    task: str
    accuracy: Accuracy
    rows: tuple[Row, ...]
    unanswered: int
    usage: Usage

    @property
    def correct(self) -> dict[str, bool]:
        """Whether each item was answered right, by id."""
        return {row["id"]: row["correct"] for row in self.rows}

    def compare(self, baseline: Sequence[Row]) -> Paired:
        """Compare with the rows of another run on the same items; tasks that this one is not are left out.

        Raises:
            DataError: if the other run lacks an item, or had one of another content.
        """
        others = {row["id"]: row for row in baseline if row["task"] == self.task}
        for row in self.rows:
            other = others.get(row["id"])
            if other is None or other["item"] != row["item"]:
                problem = "is not in" if other is None else "had another content in"
                raise DataError(
                    f"item {row['id']!r} of task {self.task!r} {problem} the run to compare with; evaluate both on the "
                    f"same file"
                )
        return compare(self.correct, {name: others[name]["correct"] for name in self.correct})

    def to_dict(self) -> dict[str, Any]:
        """Without the rows."""
        return {**vars(self.accuracy), "unanswered": self.unanswered, "usage": vars(self.usage)}


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    decoding: Decoding | None = None,
    samples: int = 1,
    vote: VoteRule = "majority",
    batch_size: int = 8,
    seed: int = 0,
    limit: int | None = None,
    results: ResultsFile | None = None,
    progress: Callable[[int], None] | None = None,
) -> TaskResult:
    """Evaluate any causal language model on a task.

    Args:
        model: ours, or one of transformers.
        tokenizer: its own.
        task: from `load_task`.
        decoding: how texts are generated; None for greedily. Multiple choice is not generated: choices are scored by the
            model, or by the decoding's spec where it has one (`DecodingSpec.decoding`).
        samples: of each generated item.
        vote: how samples make an answer.
        batch_size: rows in a batch.
        seed: of sampling.
        limit: evaluate the first so many items; None for all.
        results: rows go there as they come, and items that it has are not evaluated again.
        progress: called with the number of items that were done since the last call.

    Raises:
        ConfigError: for prompts too long for the model, a tokenizer without pad token where texts are generated, more
            than one sample of a decoding that does not sample, a number below 1.
        DataError: if `results` are of another run or task.
    """
    if batch_size < 1:
        raise ConfigError("batch_size", batch_size, "is below 1", "choose 1 or more")
    wanted = list(itertools.islice(task.items.items(), limit))
    found = {name: results.find(task.name, name, item.fingerprint) for name, item in wanted} if results else {}
    rows = {name: row for name, row in found.items() if row is not None}
    tell = progress or (lambda done: None)
    tell(len(rows))
    answering = _Answering(model, tokenizer, decoding or Generate(), samples, vote, batch_size, seed)
    for group in _groups([(name, item) for name, item in wanted if name not in rows], _BATCHES * batch_size):
        begun = time.perf_counter()
        answers = answering.answer([item for _, item in group])
        seconds = (time.perf_counter() - begun) / len(group)
        new: Sequence[Row] = [
            {"task": task.name, "id": name, "item": item.fingerprint, "type": item.type, **answer, "seconds": seconds}
            for (name, item), answer in zip(group, answers, strict=True)
        ]
        if results is not None:
            new = results.add(new)
        rows.update((row["id"], row) for row in new)
        tell(len(group))
    ordered = tuple(rows[name] for name, _ in wanted)
    return TaskResult(
        task.name,
        accuracy(sum(row["correct"] for row in ordered), len(ordered)),
        ordered,
        sum(row["predicted"] is None for row in ordered),
        sum((_usage(row) for row in ordered), Usage()),
    )


@dataclass(frozen=True)
class _Answering:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding
    samples: int
    vote: VoteRule
    batch_size: int
    seed: int

    def answer(self, items: list[Item]) -> list[dict[str, Any]]:
        """Answers to items of one group."""
        choices = [item for item in items if isinstance(item, ChoiceItem)]
        if choices:
            logits = self.decoding.spec.logits if isinstance(self.decoding, SpecDecoding) else own_logits
            return answer_choices(self.model, self.tokenizer, choices, batch_size=self.batch_size, logits=logits)
        texts = [item for item in items if isinstance(item, GenerateItem)]
        sampler = Sampler(
            self.model,
            self.tokenizer,
            self.decoding,
            max_new_tokens=texts[0].max_new_tokens,
            stop=texts[0].stop,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        check_samples(sampler, self.samples)
        return answer_texts(sampler, texts, samples=self.samples, rule=self.vote)


def _groups(items: list[Named], size: int) -> Iterator[list[Named]]:
    """Items that can be answered together: multiple choice, or texts of the same length and stops."""

    def kind(named: Named) -> str:
        item = named[1]
        return repr((item.max_new_tokens, item.stop)) if isinstance(item, GenerateItem) else ""

    for _, group in itertools.groupby(sorted(items, key=kind), key=kind):
        together = list(group)
        yield from (together[first : first + size] for first in range(0, len(together), size))


def _usage(row: Row) -> Usage:
    scored = row["scored_tokens"]
    return Usage(
        row["prompt_tokens"],
        row.get("generated_tokens", 0),
        sum(scored) if isinstance(scored, list) else scored,
        row["seconds"],
        row.get("weak_tokens", 0),
    )
