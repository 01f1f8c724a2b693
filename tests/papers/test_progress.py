from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from tests.papers.tiny import EXPERIMENT

from moesaic.papers import ArmResult, arms_of
from moesaic.papers.progress import Display, LiveDisplay
from moesaic.papers.result import Task


def tasks(output: Path) -> list[Task]:
    arms = arms_of(EXPERIMENT, "cpu")
    return [Task(EXPERIMENT, arms, name, 0, output) for name in arms]


def result_of(task: Task) -> ArmResult:
    return ArmResult(task.name, 0, {}, {"loss": 3.25}, [], 10, 1.0, 5, 4)


def test_a_line_for_each_arm_says_how_much_is_left(tmp_path: Path):
    first, second, _ = tasks(tmp_path)
    text = io.StringIO()
    shown = Display(3, {first.label: 6, second.label: 6}, Console(file=text, width=200))
    shown.started(first)
    shown.finished(first, result_of(first))
    shown.finished(second, result_of(second))
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("2/3  moe, seed 0: validation loss 3.2500, about 0:00:0")
    assert lines[1] == "3/3  dense, seed 0: validation loss 3.2500"


def test_without_a_console_nothing_is_shown(tmp_path: Path):
    task = tasks(tmp_path)[0]
    shown = Display(1, {task.label: 6}, None)
    shown.finished(task, result_of(task))
    shown.stopping()
    assert (shown.enabled, shown.done) == (False, 1)


def test_bars_follow_the_metrics_files(tmp_path: Path):
    first, second, _ = tasks(tmp_path)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(console=console, auto_refresh=False) as progress:
        shown = LiveDisplay(3, {first.label: 6, second.label: 6}, console, progress)
        for task in (first, second):
            shown.started(task)
        first.folder.mkdir(parents=True)
        (first.folder / "metrics.jsonl").write_text('{"type": "train", "step": 4}\n{"type": "tra')
        shown.update([first, second])
        assert [bar.completed for bar in progress.tasks] == [1, 4, 0]
        assert [bar.total for bar in progress.tasks] == [3, 6, 6]
        shown.finished(first, result_of(first))
        shown.ended(first)
        assert [(bar.description, bar.completed) for bar in progress.tasks] == [("all arms", 2), (second.label, 0)]
