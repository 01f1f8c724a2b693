"""One comparison of layers: check everyone, then time those who are right."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from moesaic.bench import work
from moesaic.bench.cases import Cell
from moesaic.bench.check import fault, reference
from moesaic.bench.contenders import Contender, Entry, LayerContender, Unavailable
from moesaic.bench.inputs import Layers
from moesaic.bench.result import CellResult, Row
from moesaic.bench.timing import describe

if TYPE_CHECKING:
    from moesaic.bench.run import Options


def measure_layer(
    result: CellResult,
    people: Sequence[Contender],
    layers: Layers,
    options: Options,
    deadline: float,
    tell: Callable[[str], None],
) -> None:
    """Fill in `result`. What is there when this ends with an exception can be kept.

    Args:
        result: of the cell, with a row for each contender that takes it.
        people: contenders.
        layers: gives the weights.
        options: how to measure.
        deadline: as of `time_in_turns`.
        tell: gets what is going on.
    """
    cell = result.cell
    tell("making inputs")
    inputs = layers.inputs(cell)
    describe_work = work.layer_forward_backward if cell.kind.backward else work.layer_forward
    result.work = describe_work(cell.shape, cell.tokens, inputs.touched, cell.torch_dtype.itemsize)
    result.facts |= {
        "weight_sets": len(inputs.calls),
        "touched_experts": inputs.touched,
        "rounds": options.rounds,
        "seed": options.seed,
    }
    tell("computing the reference")
    expected = reference(cell, inputs.calls[0])
    entries: dict[str, Entry] = {}
    warm: dict[str, float] = {}
    try:
        for person in people:
            if isinstance(person, LayerContender) and person.takes(cell):
                tell(f"checking {person.name}")
                started = time.perf_counter()
                entry = _admit(result.row_of(person.name), cell, partial(person.enter, cell, inputs), expected)
                if entry is not None:
                    entries[person.name], warm[person.name] = entry, time.perf_counter() - started
        del expected
        result.time(entries, rounds=options.rounds, patience=options.patience, deadline=deadline, tell=tell, warm=warm)
    finally:
        for entry in entries.values():
            entry.close()


def _admit(row: Row, cell: Cell, enter: Callable[[], Entry], expected: dict[str, Tensor]) -> Entry | None:
    """Its entry if it can run and is right; otherwise its row says why not."""
    try:
        entry = enter()
        outcome = entry.outcome()
    except Unavailable as error:
        row.status, row.reason = "unavailable", str(error)
        return None
    except Exception as error:
        row.status, row.reason = "failed", describe(error)
        return None
    wrong = None if outcome is None else fault(outcome, expected, cell.torch_dtype)
    if wrong is not None:
        row.status, row.reason = "failed", wrong
        return None
    row.note = entry.note
    return entry
