"""Choosing a decoding on one set of items and reporting it on another."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.infer.decode import DecodingLike
from moesaic.infer.tasks.costs import USUAL_COST, CostSettings
from moesaic.infer.tasks.generated import VoteRule
from moesaic.infer.tasks.load import Task
from moesaic.infer.tasks.sweep import Progress, Sweep, SweepPoint, sweep


@dataclass(frozen=True)
class Choice:
    """The decoding that was best on items for choosing, and how it did on others.

    Attributes:
        validation: all decodings on the items that the choice was made on.
        test: the first decoding and the chosen one (that one alone if they are the same) on the others.
        overlap: test items that are among those for choosing too. The accuracy of the chosen decoding on these is the
            luckiest of many, not that which it will have.
    """

    validation: Sweep
    test: Sweep
    overlap: int

    @property
    def chosen(self) -> SweepPoint:
        """The chosen decoding on the test items."""
        return self.test.points[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict."""
        return {
            "chosen": self.chosen.label,
            "overlap": self.overlap,
            "test": self.test.to_dict(),
            "validation": self.validation.to_dict(),
        }


def choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    validation: Task | Sequence[Task],
    test: Task | Sequence[Task],
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
) -> Choice:
    """Find the best decoding (`Sweep.best`) on one set of items, and evaluate it and the first one, once, on another.

    Args:
        model: as for `sweep`, whose other arguments these are.
        tokenizer: its own.
        validation: items to choose on.
        test: items to report on.
        decodings: to choose from.
        folder: results are in its subfolders `validation` and `test`.
        run: see `sweep`.
        samples: see `sweep`.
        vote: see `sweep`.
        batch_size: see `sweep`.
        seed: see `sweep`.
        limit: see `sweep`; of both sets.
        cost: measured on the items to choose on.
        progress: see `sweep`; starts anew for the test items.

    Raises:
        MoesaicError: see `sweep`.
    """
    options: dict[str, Any] = {
        "run": run,
        "samples": samples,
        "vote": vote,
        "batch_size": batch_size,
        "seed": seed,
        "limit": limit,
        "progress": progress,
    }
    parts = {name: None if folder is None else Path(folder) / name for name in ("validation", "test")}
    tried = sweep(model, tokenizer, validation, decodings, folder=parts["validation"], cost=cost, **options)
    first, best = tried.points[0], tried.best
    taken = [first] if best is first else [first, best]
    decided = [point.decoding for point in taken]
    tested = sweep(model, tokenizer, test, decided, folder=parts["test"], cost=None, **options)
    points = [replace(point, cost=known.cost) for point, known in zip(tested.points, taken, strict=True)]
    overlap = len(_contents(validation, limit) & _contents(test, limit))
    return Choice(tried, Sweep(tuple(points)), overlap)


def _contents(tasks: Task | Sequence[Task], limit: int | None) -> set[str]:
    """Fingerprints of the items that are evaluated."""
    every = [tasks] if isinstance(tasks, Task) else tasks
    return {item.fingerprint for task in every for item in itertools.islice(task.items.values(), limit)}
