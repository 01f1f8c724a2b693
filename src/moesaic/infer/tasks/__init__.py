"""Evaluation on local tasks: JSONL files of multiple choice and generated answers."""

from __future__ import annotations

from moesaic.infer.tasks.evaluate import TaskResult, evaluate_task
from moesaic.infer.tasks.generated import VoteRule
from moesaic.infer.tasks.load import Task, load_task
from moesaic.infer.tasks.results import ResultsFile, read_results
from moesaic.infer.tasks.schema import ChoiceItem, GenerateItem
from moesaic.infer.tasks.statistics import Accuracy, Paired, accuracy, compare

__all__ = [
    "Accuracy",
    "ChoiceItem",
    "GenerateItem",
    "Paired",
    "ResultsFile",
    "Task",
    "TaskResult",
    "VoteRule",
    "accuracy",
    "compare",
    "evaluate_task",
    "load_task",
    "read_results",
]
