"""Reproductions: for each paper an experiment at a stated size, its control arm, and what counts as success.

`reproduce(experiment, size, output, seeds=...)` trains every arm with every seed, measures the models and judges the
claims over seeds; `write_page` makes a page, tables and a plot of it. `moesaic reproduce NAME` does both.
"""

from __future__ import annotations

from moesaic.papers.claims import Claim, Judgement, Verdict, judge
from moesaic.papers.experiment import Arm, Column, Experiment, Forking, Section, Trained
from moesaic.papers.registry import EXPERIMENTS, experiment_named
from moesaic.papers.reproduce import Reproduction, reproduce
from moesaic.papers.result import ArmResult
from moesaic.papers.sizes import SizedArm, arms_of, size_names
from moesaic.papers.write import write_docs, write_page

__all__ = [
    "EXPERIMENTS",
    "Arm",
    "ArmResult",
    "Claim",
    "Column",
    "Experiment",
    "Forking",
    "Judgement",
    "Reproduction",
    "Section",
    "SizedArm",
    "Trained",
    "Verdict",
    "arms_of",
    "experiment_named",
    "judge",
    "reproduce",
    "size_names",
    "write_docs",
    "write_page",
]
