"""Running an experiment: all arms with all seeds, what is finished left alone, and claims judged over seeds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moesaic.data import prepare_data
from moesaic.errors import ConfigError, TrainingError
from moesaic.papers.claims import Judgement, Measured, judge
from moesaic.papers.experiment import Experiment
from moesaic.papers.progress import Display, display
from moesaic.papers.result import MEASURED, RESULT_FILE, ArmResult, Task, finished_result, perform
from moesaic.papers.sizes import arms_of
from moesaic.papers.workers import Workers
from moesaic.train.signals import StopSignals


@dataclass
class Reproduction:
    """An experiment that was run, wholly or in part.

    Attributes:
        experiment: which.
        size: at which size.
        seeds: with which seeds.
        overrides: changes to the size.
        output: folder of everything.
        arms: names of the arms of this size.
        jobs: processes side by side.
        results: of each finished arm, by seed and arm.
        signal: number of the signal that stopped it, or None.
    """

    experiment: Experiment
    size: str
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    output: Path
    arms: tuple[str, ...]
    jobs: int
    results: dict[int, dict[str, ArmResult]] = field(default_factory=dict)
    signal: int | None = None

    @property
    def finished(self) -> bool:
        """Whether every arm of every seed is there."""
        return all(len(self.results.get(seed, {})) == len(self.arms) for seed in self.seeds)

    @property
    def exit_code(self) -> int:
        """For a process: 0, or 128 + signal by the convention of shells."""
        return 0 if self.signal is None else 128 + self.signal

    @property
    def measured(self) -> list[Measured]:
        """Measurements by arm, for each seed."""
        return [
            {name: result.measurements for name, result in self.results[seed].items()}
            for seed in self.seeds
            if seed in self.results
        ]

    def judgements(self) -> list[Judgement]:
        """What the seeds say of each claim whose arms this size has; only of a finished reproduction."""
        claims = [claim for claim in self.experiment.claims if set(claim.arms) <= set(self.arms)]
        return [judge(claim, self.measured) for claim in claims]


def reproduce(
    experiment: Experiment,
    size: str,
    output: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    overrides: Iterable[str] = (),
    jobs: int | None = None,
    remeasure: bool = False,
    progress: bool = True,
) -> Reproduction:
    """Train and measure every arm with every seed; what an earlier call finished is kept, what it began goes on.

    SIGINT or SIGTERM ends it with a checkpoint of each running arm.

    Args:
        experiment: what to run.
        size: one of its sizes.
        output: folder of runs, checkpoints and the tokenised text.
        seeds: each decides initial weights and the order of the data, of all arms alike.
        overrides: `a.b=c` for every arm, `arms.NAME.a.b=c` for one.
        jobs: arms to train side by side, in processes of one thread each; 1 trains one after the other in this process
            with all threads. None for the number of cores, or 1 where there is an accelerator or nothing to train.
        remeasure: measure finished arms again, without training them again.
        progress: show progress on stderr.

    Raises:
        ConfigError: if a name or field is invalid; before anything is trained.
        TrainingError: if an arm fails; names it.
        The errors of `train`.
    """
    output, overrides = Path(output), tuple(overrides)
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError("--seeds", tuple(seeds), "is not a list of different seeds from 0", "write them as 0,1,2")
    arms = arms_of(experiment, size, overrides)
    tasks = [Task(experiment, arms, name, seed, output) for seed in seeds for name in arms]
    for task in tasks:
        task.check()
    jobs = min(_default_jobs(tasks) if jobs is None else jobs, len(tasks))
    if jobs < 1:
        raise ConfigError("--jobs", jobs, "is not a number of processes", "choose 1 or more")
    found = Reproduction(experiment, size, tuple(seeds), overrides, output, tuple(arms), jobs)
    if remeasure:
        for task in tasks:
            (task.folder / RESULT_FILE).unlink(missing_ok=True)
            for kept in task.folder.glob(f"{MEASURED}*"):
                shutil.rmtree(kept)
    pending = []
    for task in tasks:
        result = finished_result(task)
        if result is None:
            pending.append(task)
        else:
            found.results.setdefault(task.seed, {})[task.name] = result
    if pending:
        if pending[0].arm.checkpoint is None:
            prepare_data(pending[0].run.data, output / "data", progress=progress)  # once, before processes ask for it
        with display(tasks, pending, enabled=progress, single=jobs == 1) as shown:
            (_one_by_one if jobs == 1 else _side_by_side)(found, pending, shown)
    return found


def _default_jobs(tasks: Sequence[Task]) -> int:
    """A core an arm; a model that a user brings is large, and takes all of them."""
    given = any(task.arm.checkpoint is not None for task in tasks)
    return 1 if given or torch.accelerator.is_available() else os.cpu_count() or 1


def _one_by_one(found: Reproduction, pending: list[Task], shown: Display) -> None:
    for task in pending:
        shown.started(task)
        result, found.signal = perform(task, progress=shown.enabled)
        if result is None:
            return
        _keep(found, result, task, shown)


def _side_by_side(found: Reproduction, pending: list[Task], shown: Display) -> None:
    waiting, failure, asked = list(pending), None, False
    with StopSignals() as stop, Workers(found.jobs) as workers:
        while waiting or workers.running:
            if (stop.received is not None or failure is not None) and not asked:
                asked, waiting = True, []
                workers.interrupt()
                shown.stopping()
            while workers.idle and (task := _next_ready(waiting, found)) is not None:
                waiting.remove(task)
                workers.start(task)
                shown.started(task)
            for outcome in workers.outcomes(timeout=0.5):
                if outcome.error is not None:
                    failure = failure or f"{outcome.task.label}: {outcome.error}"
                elif outcome.result is not None:
                    _keep(found, outcome.result, outcome.task, shown)
                shown.ended(outcome.task)
            shown.update(workers.running)
    if failure is not None:
        raise TrainingError(f"{failure}; the other arms were stopped with a checkpoint, the same command goes on")
    found.signal = stop.received if not found.finished else None


def _next_ready(waiting: list[Task], found: Reproduction) -> Task | None:
    """The first task for which all that it needs is finished."""
    return next((task for task in waiting if task.needs <= set(found.results.get(task.seed, {}))), None)


def _keep(found: Reproduction, result: ArmResult, task: Task, shown: Display) -> None:
    found.results.setdefault(task.seed, {})[task.name] = result
    shown.finished(task, result)
