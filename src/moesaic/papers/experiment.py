"""What a reproduction is: arms, measurements of a trained model, and claims."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from moesaic.configuration import Config
from moesaic.data import PreparedData
from moesaic.papers.claims import Claim, Measured
from moesaic.papers.given import Given
from moesaic.train import RunConfig

if TYPE_CHECKING:
    from moesaic.papers.reproduce import Reproduction


@dataclass(frozen=True)
class Forking:
    """What makes the initial model of an arm from its parent's checkpoint.

    Attributes:
        checkpoint: the parent's last one, of the same seed.
        folder: where the model goes.
        options: the arm's `fork` section in the size's file.
        measured: measurements of the arms that it waits for, of the same seed.
    """

    checkpoint: Path
    folder: Path
    options: Mapping[str, Any]
    measured: Measured


Fork = Callable[[Forking], None]


@dataclass(frozen=True)
class Arm:
    """One of the models that an experiment trains; its numbers stand in the size's YAML file.

    Attributes:
        text: what it is, in a line.
        parent: arm from whose last checkpoint it starts, of the same seed.
        fork: makes its initial model of the parent's; None takes the parent's as it is.
        after: arms whose measurements the fork needs.
        compared: whether it is a result; a stage that others start from is not.
    """

    text: str
    parent: str | None = None
    fork: Fork | None = None
    after: tuple[str, ...] = ()
    compared: bool = True


@dataclass(frozen=True)
class Trained:
    """A trained arm of one seed, for measurements.

    Attributes:
        arm: its name.
        run: what was trained.
        model: in evaluation mode.
        data: held-out batches are in it.
        initial: folder of the model that it started from, for forked arms.
        checkpoints: those on disk, by step: the last one, and those of `train.checkpoint_steps`.
        options: of the measurements, as the size's file has them.
        folder: for what long measurements keep, so that they go on where they were interrupted; None keeps nothing.
    """

    arm: str
    run: RunConfig
    model: PreTrainedModel
    data: PreparedData
    initial: Path | None = None
    checkpoints: Mapping[int, Path] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True)
class Section:
    """A part of the page that only this experiment has.

    Attributes:
        title: of the part; its figure is named by it.
        text: what is seen there, in Markdown.
        table: makes a Markdown table of the finished reproduction; None for none, as is an empty one.
        draw: draws a figure, given an empty matplotlib figure with the finished reproduction; None for none.
        size: width and height of the figure in inches.
        caption: of the figure, for those who can't see it.
    """

    title: str
    text: str = ""
    table: Callable[[Reproduction], str] | None = None
    draw: Callable[[Any, Reproduction], None] | None = None
    size: tuple[float, float] = (9.6, 3.8)
    caption: str = ""

    @property
    def stem(self) -> str:
        """Name of the figure's file, without the page's name and suffix."""
        return "-".join(re.findall(r"\w+", self.title.lower().replace("'", "")))


Measurement = float | Sequence[float]
"""A number, which claims and columns see, or numbers of a curve or a table, which only sections see."""


@dataclass(frozen=True)
class Column:
    """A measurement as a column of the page.

    Attributes:
        heading: what a reader sees.
        digits: digits after the point.
    """

    heading: str
    digits: int = 4


@dataclass(frozen=True)
class Experiment:
    """A reproduction.

    Attributes:
        name: of the command, the files and the page.
        module: Python module that holds it as `EXPERIMENT`; the files of its sizes lie beside it.
        title: of the page.
        paper: citation.
        question: what it asks, in a line.
        arms: by name, in the order of the page; a parent stands before the arms that start from it. A size takes those
            that its file lists.
        control: name of the arm that the others are compared with.
        measure: measurements of a trained arm by name, besides the validation losses that every arm has. Lists of
            numbers go to `ArmResult.series`.
        columns: which measurements the page shows.
        claims: what the paper says.
        notes: what a reader must know to read the numbers right.
        panel: draws the second panel of the plot, given matplotlib axes and the measurements by seed; None for none.
        sections: further parts of the page, after the arms.
        options: what the `measure` section of an arm may say; None for nothing.
        measure_given: measurements of a model that a user brings, in sizes with a `checkpoint` section.
    """

    name: str
    module: str
    title: str
    paper: str
    question: str
    arms: Mapping[str, Arm]
    control: str
    measure: Callable[[Trained], Mapping[str, Measurement]]
    columns: Mapping[str, Column]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()
    panel: Callable[[Any, list[Measured]], None] | None = None
    sections: tuple[Section, ...] = ()
    options: type[Config] | None = None
    measure_given: Callable[[Given], Mapping[str, Measurement]] | None = None

    def __reduce__(self) -> tuple[Callable[[str], Experiment], tuple[str]]:
        """Pickled by module: the functions of claims don't pickle."""
        return _experiment_of, (self.module,)


def _experiment_of(module: str) -> Experiment:
    return import_module(module).EXPERIMENT
