"""Training and measuring one arm with one seed, and the file that its numbers are kept in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moesaic.data import PreparedData, prepare_data
from moesaic.errors import CheckpointError, ConfigError, TrainingError
from moesaic.files import atomic_directory, write_text
from moesaic.papers.experiment import Experiment, Forking, Measurement, Trained
from moesaic.papers.given import Given, parameters_of
from moesaic.papers.sizes import SizedArm
from moesaic.trace import account
from moesaic.train import CheckpointStore, RunConfig, TrainResult, load_model, overall, read_metrics, train
from moesaic.train.loop import CHECKPOINTS, METRICS_FILE
from moesaic.train.model import select_device
from moesaic.train.quiet import without_progress_bars

RESULT_FILE = "result.json"
MEASURED = "measured-"
_FORMAT = 1


@dataclass(frozen=True)
class ArmResult:
    """What is known of an arm with one seed.

    Attributes:
        arm: its name.
        seed: its seed.
        run: the resolved run, as a dict; with options of the measurements, they are its `measure`. Of a model that a user
            brought it has only its `checkpoint`.
        measurements: `loss` over all domains, `loss.DOMAIN`, `tokens_per_second` of training, and what the experiment measures.
        curve: (tokens, validation loss) of each evaluation.
        tokens: trained on.
        seconds: of training steps, without evaluation, checkpoints and measurements.
        parameters: stored.
        active_parameters: in use for a token.
        series: lists of numbers that the experiment measures, for figures and tables.
    """

    arm: str
    seed: int
    run: dict[str, Any]
    measurements: dict[str, float]
    curve: list[tuple[int, float]]
    tokens: int
    seconds: float
    parameters: int
    active_parameters: int
    series: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """An arm to train and measure with one seed, in a folder of its own.

    Attributes:
        experiment: which.
        arms: all arms of its size.
        name: of the arm.
        seed: its seed.
        output: folder of the experiment.
    """

    experiment: Experiment
    arms: Mapping[str, SizedArm]
    name: str
    seed: int
    output: Path

    @property
    def folder(self) -> Path:
        """Where this arm and seed live."""
        return self.output / f"seed-{self.seed}" / self.name

    def other(self, name: str) -> Task:
        """Another arm with the same seed."""
        return replace(self, name=name)

    @property
    def parent(self) -> str | None:
        """Arm that it starts from."""
        return self.experiment.arms[self.name].parent

    @property
    def needs(self) -> frozenset[str]:
        """Arms of the same seed that must be finished first."""
        return frozenset(self.experiment.arms[self.name].after) | ({self.parent} if self.parent else set())

    @property
    def initial(self) -> Path | None:
        """Folder of the model that a forked arm starts from, named by all that decides what it is."""
        if self.parent is None:
            return None
        sources = {name: self.other(name).run.to_dict() for name in sorted(self.needs)}
        text = json.dumps([self.arms[self.name].fork, sources], sort_keys=True)
        return self.folder / f"initial-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    @property
    def arm(self) -> SizedArm:
        """The arm at this size."""
        return self.arms[self.name]

    @property
    def run(self) -> RunConfig:
        """What is trained."""
        return self.arm.run(self.seed, self.initial)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the result, as plain data."""
        given, measure = self.arm.given, self.arm.measure
        decides = self.run.to_dict() if given is None else {"checkpoint": given.to_dict()}
        return {**decides, **({"measure": measure} if measure else {})}

    @property
    def measured(self) -> Path:
        """Folder for what measurements keep, named by the model that they are of."""
        model = {name: value for name, value in self.settings.items() if name != "measure"}
        digest = hashlib.sha256(json.dumps(model, sort_keys=True, default=str).encode()).hexdigest()[:12]
        return self.folder / f"{MEASURED}{digest}"

    @property
    def steps(self) -> int:
        """Steps to train; 1 where there is nothing to train."""
        return 1 if self.arm.checkpoint is not None else self.run.train.steps

    def check(self) -> None:
        """Check every field before any work is done.

        Raises:
            ConfigError: if one is invalid.
        """
        options = self.experiment.options
        if options is not None:
            options.from_dict(self.arm.measure, where="measure")
        elif self.arm.measure:
            raise ConfigError("measure", self.arm.measure, "are options of another experiment", "leave them out")
        given = self.arm.given
        if given is None:
            assert self.run is not None
        else:
            given.check()

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.name}, seed {self.seed}"

    @property
    def steps_made(self) -> int:
        """Steps of this arm so far, by its metrics file."""
        path = self.folder / METRICS_FILE
        if not path.is_file():
            return 0
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 8192))
            lines = stream.read().decode("utf-8", errors="replace").split("\n")[:-1]
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue
        return 0


def finished_result(task: Task) -> ArmResult | None:
    """The result that an earlier call left, or None if there is none of exactly this run.

    Raises:
        CheckpointError: if the file is damaged.
    """
    path = task.folder / RESULT_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != _FORMAT:
            return None
        found = ArmResult(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it to measure the arm again") from error
    return found if found.run == json.loads(json.dumps(task.settings)) else None


def perform(task: Task, *, progress: bool = False) -> tuple[ArmResult | None, int | None]:
    """Train the arm of `task` to the end, or as far as a signal lets it, and measure it.

    Returns:
        Its result, or None and the signal that stopped it.

    Raises:
        The errors of `train`.
    """
    if task.arm.checkpoint is not None:
        return _kept(task, _measure_given(task)), None
    if task.initial is not None:
        _fork(task, task.initial)
    run = task.run
    data = prepare_data(run.data, task.output / "data", progress=progress)
    trained = train(run, task.folder, resume="auto", data=data, progress=progress)
    if not trained.finished:
        return None, trained.signal
    if trained.step != run.train.steps:
        raise TrainingError(
            f"{task.folder} was trained for {trained.step} steps, which is more than the {run.train.steps} of this run; "
            f"choose another output folder"
        )
    return _kept(task, _measure(task, run, data, trained)), None


def _kept(task: Task, result: ArmResult) -> ArmResult:
    write_text(task.folder / RESULT_FILE, json.dumps({"format": _FORMAT, **asdict(result)}, indent=1))
    return result


def _fork(task: Task, initial: Path) -> None:
    """Write the initial model of a forked arm, unless an earlier call did."""
    if initial.is_dir():
        return
    assert task.parent is not None
    checkpoint = CheckpointStore(task.other(task.parent).folder / CHECKPOINTS, keep=1).latest()
    if checkpoint is None:
        raise TrainingError(f"{task.label} starts from {task.parent}, which has no checkpoint; train that first")
    arm = task.experiment.arms[task.name]
    measured = {name: _measurements_in(task.other(name).folder) for name in arm.after}
    with atomic_directory(initial) as temporary, without_progress_bars():
        (arm.fork or _copy)(Forking(checkpoint, temporary, task.arms[task.name].fork, measured))


def _copy(forking: Forking) -> None:
    load_model(forking.checkpoint).save_pretrained(forking.folder)


def _measurements_in(folder: Path) -> dict[str, float]:
    """Of an arm that is finished."""
    path = folder / RESULT_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))["measurements"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} can't be read ({error}); run the same command to measure that arm again"
        ) from error


def _measure(task: Task, run: RunConfig, data: PreparedData, result: TrainResult) -> ArmResult:
    model = load_model(result.checkpoint).to(select_device(run.train.device)).eval()  # pyright: ignore[reportArgumentType]
    saved = CheckpointStore(task.folder / CHECKPOINTS, keep=1).all()
    trained = Trained(
        task.name,
        run,
        model,
        data,
        task.initial,
        {int(path.name.removeprefix("step-")): path for path in saved},
        task.arm.measure,
        task.measured,
    )
    losses = {f"loss.{domain}": found.loss for domain, found in result.validation.items()}
    counted = account(model)
    lines = read_metrics(result.metrics_file)
    steps = [line for line in lines if line["type"] == "train"]
    tokens_of_step = result.tokens / run.train.steps
    seconds = sum(tokens_of_step / line["tokens_per_second"] for line in steps)
    measured = task.experiment.measure(trained)
    measurements = {
        "loss": overall(result.validation).loss,
        **losses,
        "tokens_per_second": result.tokens / seconds,
        **_numbers(measured),
    }
    return ArmResult(
        arm=task.name,
        seed=task.seed,
        run=task.settings,
        measurements=measurements,
        curve=[(round(line["step"] * tokens_of_step), line["loss"]) for line in lines if line["type"] == "evaluation"],
        tokens=result.tokens,
        seconds=seconds,
        parameters=counted.total,
        active_parameters=counted.active,
        series=_lists(measured),
    )


def _measure_given(task: Task) -> ArmResult:
    """The result of a model that a user brought."""
    given, measure = task.arm.given, task.experiment.measure_given
    assert given is not None, "the arm has a checkpoint"
    assert measure is not None, "Task.check sees to it"
    model, tokenizer = given.load()
    measured = measure(Given(task.name, task.seed, model, tokenizer, task.arm.measure, task.measured))
    total, active = parameters_of(model)
    return ArmResult(
        arm=task.name,
        seed=task.seed,
        run=task.settings,
        measurements=_numbers(measured),
        curve=[],
        tokens=0,
        seconds=0.0,
        parameters=total,
        active_parameters=active,
        series=_lists(measured),
    )


def _numbers(measured: Mapping[str, Measurement]) -> dict[str, float]:
    return {name: value for name, value in measured.items() if isinstance(value, float | int)}


def _lists(measured: Mapping[str, Measurement]) -> dict[str, list[float]]:
    return {name: list(value) for name, value in measured.items() if not isinstance(value, float | int)}
