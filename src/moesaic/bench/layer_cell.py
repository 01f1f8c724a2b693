"""One comparison of layers: check everyone, then time those who are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from moesaic.bench import work
from moesaic.bench.admission import Admitted
from moesaic.bench.check import fault, reference
from moesaic.bench.contenders import Contender, LayerContender
from moesaic.bench.inputs import Layers
from moesaic.bench.result import CellResult

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
    result.facts |= {"weight_sets": len(inputs.calls), "touched_experts": inputs.touched}
    tell("computing the reference")
    expected = reference(cell, inputs.calls[0])
    admitted = Admitted()
    try:
        for person in people:
            if isinstance(person, LayerContender) and person.takes(cell):
                tell(f"checking {person.name}")
                admitted.admit(
                    result.row_of(person.name),
                    partial(person.enter, cell, inputs),
                    lambda outcome: fault(outcome, expected, cell.torch_dtype),
                )
        expected.clear()
        result.time(admitted, rounds=options.rounds, patience=options.patience, deadline=deadline, tell=tell)
    finally:
        admitted.close()
