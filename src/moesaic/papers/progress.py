"""What a person sees while an experiment runs: bars on a terminal, a line for each arm elsewhere. All goes to stderr."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from moesaic.papers.result import ArmResult, Task


class Display:
    """Lines for arms that end, with an estimate of the time that is left.

    Args:
        total: arms with seeds in all.
        left: steps that each pending task still has to make.
        console: where to show it; None shows nothing.
    """

    def __init__(self, total: int, left: dict[str, int], console: Console | None) -> None:
        self._total, self._left, self._console = total, left, console
        self._all_steps, self._begun = sum(left.values()), time.monotonic()
        self.done = total - len(left)

    @property
    def enabled(self) -> bool:
        """Whether anything is shown."""
        return self._console is not None

    def started(self, task: Task) -> None:
        """An arm starts, or goes on."""

    def update(self, running: Sequence[Task]) -> None:
        """Time has passed."""

    def ended(self, task: Task) -> None:
        """An arm is no longer running, whatever became of it."""

    def stopping(self) -> None:
        """A signal came."""
        self._line("stopping; running arms write a checkpoint first")

    def finished(self, task: Task, result: ArmResult) -> None:
        """An arm is trained and measured."""
        self.done += 1
        self._left.pop(task.label, None)
        made = self._all_steps - sum(self._left.values())
        left = (time.monotonic() - self._begun) / max(made, 1) * sum(self._left.values())
        loss = result.measurements.get("loss")
        trained = "" if loss is None else f": validation loss {loss:.4f}"
        about = f", about {timedelta(seconds=round(left))} left" if self._left else ""
        self._line(f"{self.done}/{self._total}  {task.label}{trained}{about}")

    def _line(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class SingleDisplay(Display):
    """For arms that are trained in this process and show their own steps."""

    def started(self, task: Task) -> None:
        self._line(f"{self.done + 1}/{self._total}  {task.label}")


class LiveDisplay(Display):
    """A bar for each running arm, above one for all."""

    def __init__(self, total: int, left: dict[str, int], console: Console, progress: Progress) -> None:
        super().__init__(total, left, console)
        self._progress = progress
        self._overall = progress.add_task("all arms", total=total, completed=self.done)
        self._bars: dict[str, TaskID] = {}

    def started(self, task: Task) -> None:
        self._bars[task.label] = self._progress.add_task(task.label, total=task.steps)

    def update(self, running: Sequence[Task]) -> None:
        for task in running:
            self._progress.update(self._bars[task.label], completed=task.steps_made)

    def ended(self, task: Task) -> None:
        self._progress.remove_task(self._bars.pop(task.label))

    def finished(self, task: Task, result: ArmResult) -> None:
        super().finished(task, result)
        self._progress.update(self._overall, completed=self.done)


@contextlib.contextmanager
def display(tasks: Sequence[Task], pending: Sequence[Task], *, enabled: bool, single: bool) -> Iterator[Display]:
    """The display that fits the console.

    Args:
        tasks: all of the experiment.
        pending: those that are not finished.
        enabled: whether to show anything.
        single: whether arms are trained in this process, with a display of their own.
    """
    left = {task.label: max(task.steps - task.steps_made, 1) for task in pending}
    console = Console(stderr=True) if enabled else None
    if console is None or not console.is_terminal or single:
        yield (SingleDisplay if single else Display)(len(tasks), left, console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield LiveDisplay(len(tasks), left, console, progress)
