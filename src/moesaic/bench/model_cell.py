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
from moesaic.bench.result import CellResult

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

    def wrong(outcome: dict[str, Tensor]) -> str | None:
        error = distance(outcome["logits"].to(expected.device)[None], expected[None])
        limit = TOLERANCE[cell.torch_dtype]
        if error <= limit:
            return None
        return f"logits are {error:.2g} away from those of transformers with {REFERENCE} experts, more than {limit:g}"

    admitted = Admitted()
    try:
        for person in people:
            if isinstance(person, ModelContender) and person.takes(cell):
                tell(f"checking {person.name}")
                admitted.admit(result.row_of(person.name), partial(person.enter, cell, model), wrong)
        result.time(admitted, rounds=options.rounds, patience=options.patience, deadline=deadline, tell=tell)
    finally:
        admitted.close()
        _compare_tokens(result)


def _compare_tokens(result: CellResult) -> None:
    """Note how many of the first tokens equal those of transformers' eager experts."""
    reference = next((row for row in result.rows if row.name == f"transformers:{REFERENCE}"), None)
    wanted = reference.facts.get("tokens", []) if reference is not None else []
    for row in result.rows:
        found = row.facts.get("tokens", [])
        if row is reference or row.family == "dense" or not found or not wanted:
            continue
        same = next((i for i, (one, other) in enumerate(zip(found, wanted, strict=True)) if one != other), len(wanted))
        row.facts["same_tokens"] = same
        text = f"first {same} of {len(wanted)} greedy tokens as of transformers eager"
        row.note = f"{row.note}; {text}" if row.note else text
