"""Speed of expert kernels beside their neighbours and beside what the machine can do (`moesaic bench`).

Everything that is compared runs in turns in one process, on the same weights and picks, and is checked against the
`loop` kernel first.
"""

from __future__ import annotations

from moesaic.bench.cases import CASES, Case, Cell, case_named, cells
from moesaic.bench.compare import Change, changes
from moesaic.bench.inputs import ROUTINGS
from moesaic.bench.models import ModelSize
from moesaic.bench.result import CellResult, Row
from moesaic.bench.run import BenchRun, Options, run_bench
from moesaic.bench.shapes import DTYPES, PRESETS, QUICK_SHAPE, Shape
from moesaic.bench.store import NAME, Saved, Store, read
from moesaic.bench.write import write_page

__all__ = [
    "CASES",
    "DTYPES",
    "NAME",
    "PRESETS",
    "QUICK_SHAPE",
    "ROUTINGS",
    "BenchRun",
    "Case",
    "Cell",
    "CellResult",
    "Change",
    "ModelSize",
    "Options",
    "Row",
    "Saved",
    "Shape",
    "Store",
    "case_named",
    "cells",
    "changes",
    "read",
    "run_bench",
    "write_page",
]
