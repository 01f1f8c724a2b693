"""One comparison of whole models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from moesaic.bench import work
from moesaic.bench.admission import Admitted
from moesaic.bench.check import distance
from moesaic.bench.contenders import Contender, ModelContender
from moesaic.bench.contenders.model import experts_implementation
from moesaic.bench.models import Models, decoded_logits
from moesaic.bench.result import CellResult, Row

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.bench.run import Options

# Distance over length of the logits. Rounding moves them by less, but now and then an expert is picked instead of one
# that is nearly as likely. Logits of a model that computes something else are 1.4 away.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.25, torch.float16: 0.1}
REFERENCE = "eager"


def measure_model(
    result: CellResult,
    people: Sequence[Contender],
    models: Models,
    options: Options,
    deadline: float,
    tell: Callable[[str], None],
) -> None:
    """Fill in `result`; as `measure_layer`, but for whole models."""
    cell = result.cell
    tell("making the model")
    model = models.of(cell)
    # The middle of what is generated.
    context = cell.tokens + (model.size.new_tokens // 2 if cell.kind.cold else 0)
    tokens = 1 if cell.kind.cold else cell.tokens
    result.work = work.model_forward(cell.shape, model.size, tokens, context, cell.torch_dtype.itemsize)
    result.facts |= {
        "layers": model.size.layers,
        "vocabulary": model.size.vocabulary,
        "new_tokens": model.size.new_tokens,
    }
    tell("computing the reference")
    with experts_implementation(REFERENCE, model.stock):
        expected = decoded_logits(model.stock, model.prompt(cell), 0)

    def wrong(row: Row, outcome: dict[str, Tensor]) -> str | None:
        row.facts["logits_distance"] = error = distance(outcome["logits"].to(expected.device)[None], expected[None])
        limit = TOLERANCE[cell.torch_dtype]
        if error <= limit:
            return None
        return f"logits are {error:.2g} away from those of transformers with {REFERENCE} experts, more than {limit:g}"

    admitted = Admitted()
    try:
        for person in people:
            if isinstance(person, ModelContender) and person.takes(cell):
                tell(f"checking {person.name}")
                row = result.row_of(person.name)
                admitted.admit(row, partial(person.enter, cell, model), partial(wrong, row))
        result.time(admitted, rounds=options.rounds, patience=options.patience, deadline=deadline, tell=tell)
    finally:
        admitted.close()
        _compare_tokens(result)


def _compare_tokens(result: CellResult) -> None:
    """Note how near everyone's logits are to those of transformers' eager experts, and how many first tokens equal."""
    reference = next((row for row in result.rows if row.name == f"transformers:{REFERENCE}"), None)
    wanted = reference.facts.get("tokens", []) if reference is not None else []
    for row in result.rows:
        if not row.measured or "logits_distance" not in row.facts:
            continue
        notes = [row.note] if row.note else []
        notes.append(f"logits {row.facts['logits_distance']:.1g} away")
        found = row.facts.get("tokens", [])
        if row is not reference and found and wanted:
            equal = [one == other for one, other in zip(found, wanted, strict=True)]
            same = row.facts["same_tokens"] = equal.index(False) if False in equal else len(wanted)
            notes.append(f"first {same} of {len(wanted)} tokens as with {REFERENCE} experts")
        row.note = ", ".join(notes)
