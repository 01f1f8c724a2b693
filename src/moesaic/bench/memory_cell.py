"""One comparison of peak memory: a fresh process for each contender."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moesaic.bench import work
from moesaic.bench.contenders import Contender
from moesaic.bench.result import CellResult
from moesaic.bench.timing import TimeUp

if TYPE_CHECKING:
    from moesaic.bench.run import Options


def measure_memory(
    result: CellResult,
    people: Sequence[Contender],
    options: Options,
    deadline: float,
    tell: Callable[[str], None],
) -> None:
    """Fill in `result`, one sample for each contender."""
    cell = result.cell
    result.work = work.layer_forward_backward(
        cell.shape, cell.tokens, min(cell.shape.experts, cell.tokens * cell.shape.picks), cell.torch_dtype.itemsize
    )
    for person in people:
        if not person.takes(cell):
            continue
        if time.monotonic() > deadline:
            raise TimeUp
        tell(f"a step of {person.name}")
        row = result.row_of(person.name)
        request = {"name": person.name, "cell": cell.to_dict(), "seed": options.seed}
        done = subprocess.run(
            [sys.executable, "-m", "moesaic.bench.memory", json.dumps(request)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            row.status = "failed"
            row.reason = f"its process ended with code {done.returncode}: {done.stderr.strip()[-200:]}"
            continue
        answer = json.loads(done.stdout.splitlines()[-1])
        if "bytes" in answer:
            row.status, row.samples = "measured", [float(answer["bytes"])]
            row.note, row.default = answer["note"], answer["default"]
        else:
            row.status, row.reason = answer["status"], answer["reason"]
    result.finished = True
