"""What a person sees while training: a live bar on a terminal, plain lines elsewhere. All goes to stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moesaic.train.evaluate import Evaluation, overall
from moesaic.train.metrics import StepMetrics


class ProgressDisplay(Protocol):
    """Shows how training goes."""

    def step(self, metrics: StepMetrics) -> None:
        """A step was made."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line of its own happened."""
        ...

    def close(self) -> None:
        """Training ended."""
        ...


def progress_display(steps: int, first: int, log_every: int, console: Console | None = None) -> ProgressDisplay:
    """The display that fits the console.

    Args:
        steps: steps of the whole run.
        first: steps already made.
        log_every: steps between plain lines.
        console: where to show it; None for stderr.
    """
    console = console or Console(stderr=True)
    return LiveProgress(steps, first, console) if console.is_terminal else PlainProgress(steps, log_every, console)


class LiveProgress:
    """A bar with the numbers of the last step and the time that is left."""

    def __init__(self, steps: int, first: int, console: Console) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=steps, completed=first, numbers="")
        self._progress.start()

    def step(self, metrics: StepMetrics) -> None:
        self._progress.update(self._task, completed=metrics.step, numbers=describe_step(metrics))

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


class PlainProgress:
    """A line every `log_every` steps, and after the last."""

    def __init__(self, steps: int, log_every: int, console: Console) -> None:
        self._steps, self._log_every, self._console = steps, log_every, console
        self._started, self._made = time.monotonic(), 0

    def step(self, metrics: StepMetrics) -> None:
        self._made += 1
        if metrics.step % self._log_every and metrics.step != self._steps:
            return
        seconds = (time.monotonic() - self._started) / self._made * (self._steps - metrics.step)
        left = timedelta(seconds=round(seconds))
        self.note(f"step {metrics.step}/{self._steps}  {describe_step(metrics)}  {left} left")

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


class NoProgress:
    """Shows nothing."""

    def step(self, metrics: StepMetrics) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def describe_step(metrics: StepMetrics) -> str:
    """Loss, max violation, drop rate and null share of the worst layer of each, and speed in a few words."""
    parts = [f"loss {metrics.loss:.3f}"]
    if metrics.balance:
        parts.append(f"balance {metrics.balance['worst']:.2f} (layer {metrics.balance['worst_layer']})")
    if metrics.drop_rate:
        parts.append(f"dropped {_worst(metrics.drop_rate)}")
    if metrics.null_share:
        parts.append(f"null {_worst(metrics.null_share)}")
    return f"{'  '.join(parts)}  {metrics.tokens_per_second:,.0f} tokens/s"


def _worst(shares: Mapping[int, float]) -> str:
    """The largest share and the layer that has it."""
    layer = max(shares, key=shares.__getitem__)
    return f"{shares[layer]:.1%} (layer {layer})"


def describe_evaluation(step: int, evaluations: Mapping[str, Evaluation]) -> str:
    """Validation loss and perplexity by domain in a line."""
    domains = ", ".join(f"{name} {found.loss:.3f} (ppl {found.perplexity:.2f})" for name, found in evaluations.items())
    return f"step {step}: validation loss {overall(evaluations).loss:.3f}: {domains}"
