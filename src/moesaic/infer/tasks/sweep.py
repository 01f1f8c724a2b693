"""Many decodings on the same tasks: accuracy of each, paired with the first, against what it costs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.errors import ConfigError
from moesaic.infer.consistency import SpecDecoding
from moesaic.infer.decode import DecodingLike, DecodingSpec
from moesaic.infer.tasks.costs import USUAL_COST, Cost, CostSettings, measure_costs, runs_of
from moesaic.infer.tasks.evaluate import TaskResult, evaluate_task
from moesaic.infer.tasks.generated import VoteRule
from moesaic.infer.tasks.load import Task
from moesaic.infer.tasks.results import ResultsFile, digest
from moesaic.infer.tasks.statistics import Accuracy, Paired, accuracy, compare

Axis = Literal["seconds", "bytes", "positions"]
# Called with what is being done, and how much of all is done.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SweepPoint:
    """One decoding.

    Attributes:
        decoding: which.
        tasks: how it did, by task.
        compared: with the first decoding on the same items; None of that one.
        cost: of a new token; None if not measured.
    """

    decoding: DecodingSpec
    tasks: Mapping[str, TaskResult]
    compared: Paired | None
    cost: Cost | None

    @property
    def label(self) -> str:
        """The decoding as text."""
        return self.decoding.label

    @property
    def accuracy(self) -> Accuracy:
        """Over the items of all tasks."""
        results = self.tasks.values()
        return accuracy(sum(r.accuracy.correct for r in results), sum(r.accuracy.items for r in results))

    def cost_on(self, axis: Axis) -> float:
        """Its cost as a multiple of the first decoding's: seconds or bytes for each token, or as positions for each token.

        Raises:
            ConfigError: if this was not measured.
        """
        if self.cost is not None:
            found = {
                "seconds": self.cost.time_ratio,
                "bytes": self.cost.bytes_ratio,
                "positions": self.cost.positions,
            }[axis]
            if found is not None:
                return found
        raise ConfigError("cost", axis, "was not measured", "measure it, or choose another one")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict, without rows."""
        return {
            "decoding": self.label,
            **vars(self.accuracy),
            "tasks": {name: result.to_dict() for name, result in self.tasks.items()},
            "compared": None if self.compared is None else vars(self.compared),
            "cost": None if self.cost is None else vars(self.cost),
        }


@dataclass(frozen=True)
class Sweep:
    """All decodings, in the order that they were given in."""

    points: tuple[SweepPoint, ...]

    @property
    def axis(self) -> Axis:
        """The measure of cost that says most of those that were taken: seconds, or else bytes."""
        cost = self.points[0].cost
        return "seconds" if cost is not None and cost.time_ratio is not None else "bytes"

    @property
    def best(self) -> SweepPoint:
        """The most accurate one; of equal ones the cheapest, and then the earliest."""
        measured = self.points[0].cost is not None
        return max(
            self.points, key=lambda point: (point.accuracy.value, -point.cost_on(self.axis) if measured else 0.0)
        )

    def by_cost(self, axis: Axis | None = None) -> list[SweepPoint]:
        """From the cheapest to the dearest."""
        return sorted(self.points, key=lambda point: point.cost_on(axis or self.axis))

    def front(self, axis: Axis | None = None) -> list[SweepPoint]:
        """Those than which no other is both as cheap and as accurate and better in one of the two, by cost."""
        chosen = axis or self.axis
        ordered = sorted(self.points, key=lambda point: (point.cost_on(chosen), -point.accuracy.value))
        found: list[SweepPoint] = []
        for point in ordered:
            if not found or point.accuracy.value > found[-1].accuracy.value:
                found.append(point)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict."""
        measured = self.points[0].cost is not None
        return {
            "first": self.points[0].label,
            "best": self.best.label,
            "front": [point.label for point in self.front()] if measured else [],
            "points": [point.to_dict() for point in self.points],
        }


def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Task | Sequence[Task],
    decodings: DecodingLike | Sequence[DecodingLike],
    *,
    folder: str | Path | None = None,
    run: Mapping[str, Any] | None = None,
    samples: int = 1,
    vote: VoteRule = "majority",
    batch_size: int = 8,
    seed: int = 0,
    limit: int | None = None,
    cost: CostSettings | None = USUAL_COST,
    progress: Progress | None = None,
) -> Sweep:
    """Evaluate many decodings on the same items, and measure what each costs.

        found = sweep(model, tokenizer, load_task("sums.jsonl"), ["greedy", "self-contrast beta={0.1,0.3,0.5}"])
        found.best.label, found.best.compared.p_value

    Args:
        model: as for `evaluate_task`.
        tokenizer: its own.
        tasks: from `load_task`.
        decodings: anything that `DecodingSpec.grid_of` takes; the first is what others are compared with. One that is there
            twice counts once.
        folder: results of every item go there, a file for each decoding; a sweep that was cut short goes on.
        run: what identifies the model and its settings in these files; its path without it.
        samples: of each generated item; decodings that do not sample are asked once.
        vote: how samples make an answer.
        batch_size: rows in a batch.
        seed: of sampling.
        limit: the first so many items of each task; None for all.
        cost: how costs are measured, after the evaluation; None to leave them out.
        progress: see `Progress`.

    Raises:
        ConfigError: see `evaluate_task` and `DecodingSpec.of`.
        DataError: if the folder holds results of another run or task.
    """
    specs = list({spec.label: spec for spec in DecodingSpec.grid_of(decodings)}.values())
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    if not specs or not tasks:
        raise ConfigError("decodings" if tasks else "tasks", [], "is empty", "give at least one")
    kept = {task.name: dict(itertools.islice(task.items.items(), limit)) for task in tasks}
    prompts = [item.prompt for items in kept.values() for item in items.values()]
    total = len(specs) * len(prompts) + (0 if cost is None else runs_of(cost, len(prompts), len(specs)))
    steps = _Steps(total, progress)
    identity = {"model": model.name_or_path} if run is None else dict(run)
    found: list[dict[str, TaskResult]] = []
    for spec in specs:
        decoding = SpecDecoding(spec)
        asked = 1 if decoding.repeats else samples
        settings = {"samples": asked, "vote": vote if asked > 1 else "", "seed": 0 if decoding.repeats else seed}
        file = None if folder is None else _file(Path(folder), spec, {**identity, **settings})
        found.append(
            {
                task.name: evaluate_task(
                    model,
                    tokenizer,
                    task,
                    decoding=decoding,
                    samples=asked,
                    vote=vote,
                    batch_size=batch_size,
                    seed=seed,
                    limit=limit,
                    results=file,
                    progress=steps.of(spec.label),
                )
                for task in tasks
            }
        )
    costs: Sequence[Cost | None] = [None] * len(specs)
    if cost is not None:
        costs = measure_costs(model, tokenizer, prompts, specs, cost, seed=seed, progress=steps.of("cost"))
    first = _correct(found[0])
    return Sweep(
        tuple(
            SweepPoint(spec, results, compare(_correct(results), first) if place else None, costs[place])
            for place, (spec, results) in enumerate(zip(specs, found, strict=True))
        )
    )


class _Steps:
    """Adds up what is done."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def of(self, what: str) -> Callable[[int], None]:
        def advance(done: int) -> None:
            self._done += done
            if self._progress is not None:
                self._progress(what, self._done, self._total)

        return advance


def _file(folder: Path, spec: DecodingSpec, run: Mapping[str, Any]) -> ResultsFile:
    """Where the results of a decoding are: under a name that can be read and is its own."""
    values = spec.model_dump(mode="json")
    name = re.sub(r"[^a-z0-9.]+", "-", spec.label.lower()).strip("-.")[:60]
    return ResultsFile(folder / "results" / f"{name}-{digest(values)[:8]}.jsonl", {**run, "decoding": values})


def _correct(results: Mapping[str, TaskResult]) -> dict[str, bool]:
    """Whether each item was answered right, over all tasks."""
    return {f"{task}: {name}": right for task, result in results.items() for name, right in result.correct.items()}
