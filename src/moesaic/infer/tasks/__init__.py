"""Evaluation on local tasks: JSONL files of multiple choice and generated answers."""

from __future__ import annotations

from moesaic.infer.tasks.choose import Choice, choose
from moesaic.infer.tasks.costs import Cost, CostSettings, measure_costs
from moesaic.infer.tasks.evaluate import TaskResult, evaluate_task
from moesaic.infer.tasks.generated import VoteRule
from moesaic.infer.tasks.load import Task, load_task
from moesaic.infer.tasks.pictures import check_picture, draw_sweep
from moesaic.infer.tasks.results import ResultsFile, read_results
from moesaic.infer.tasks.schema import ChoiceItem, GenerateItem
from moesaic.infer.tasks.statistics import Accuracy, Paired, accuracy, compare
from moesaic.infer.tasks.sweep import Sweep, SweepPoint, sweep

__all__ = [
    "Accuracy",
    "Choice",
    "ChoiceItem",
    "Cost",
    "CostSettings",
    "GenerateItem",
    "Paired",
    "ResultsFile",
    "Sweep",
    "SweepPoint",
    "Task",
    "TaskResult",
    "VoteRule",
    "accuracy",
    "check_picture",
    "choose",
    "compare",
    "draw_sweep",
    "evaluate_task",
    "load_task",
    "measure_costs",
    "read_results",
    "sweep",
]
