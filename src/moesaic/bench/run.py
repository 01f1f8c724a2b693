"""Measure cell after cell, keep what was measured whatever happens, and go on where an earlier run stopped."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from moesaic.bench.cases import Cell
from moesaic.bench.contenders import Contender, contenders
from moesaic.bench.inputs import Layers
from moesaic.bench.layer_cell import measure_layer
from moesaic.bench.memory_cell import measure_memory
from moesaic.bench.model_cell import measure_model
from moesaic.bench.models import Models, ModelSize
from moesaic.bench.rates import measure_rates
from moesaic.bench.result import CellResult
from moesaic.bench.timing import TimeUp
from moesaic.errors import ConfigError
from moesaic.layer.kernels import VARIABLE


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        rounds: samples of each contender.
        patience: seconds for one contender in one cell; slower ones take part in fewer rounds.
        seed: of weights, tokens and picks.
        only: patterns of names of contenders; empty for all.
        skip: patterns of names that are left out.
        time_limit: seconds after which the run stops, or None.
        quick: smaller buffers for the rates of the machine.
        model: size of whole models.
        llama_cpp: interpreter that has llama.cpp's Python package, or None for this one.
    """

    rounds: int = 7
    patience: float = 10.0
    seed: int = 0
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    time_limit: float | None = None
    quick: bool = False
    model: ModelSize = field(default_factory=ModelSize)
    llama_cpp: str | None = None


@dataclass
class BenchRun:
    """How a run ended.

    Attributes:
        results: of all cells that were asked for and are measured, now or earlier.
        missing: cells that are not, or not with all rounds.
        stopped: why it ended early, or None.
    """

    results: list[CellResult] = field(default_factory=list)
    missing: list[Cell] = field(default_factory=list)
    stopped: Literal["interrupted", "time limit"] | None = None


Tell = Callable[[Cell, str], None]


def run_bench(
    cells: Sequence[Cell],
    options: Options,
    *,
    earlier: Iterable[CellResult] = (),
    keep: Callable[[CellResult], None] = lambda result: None,
    tell: Tell = lambda cell, text: None,
) -> BenchRun:
    """Measure all cells.

    Args:
        cells: what to measure.
        options: how.
        earlier: results of an earlier run; what they have of the same seed, rounds and contenders is not
            measured again.
        keep: gets each result as soon as it is there, also a partial one.
        tell: gets the cell and what is going on.

    Returns:
        The results. Ctrl-C and the time limit end the run early, with what was measured until then.

    Raises:
        ConfigError: for a pattern that matches nobody, and if the variable MOESAIC_KERNEL is set.
    """
    if os.environ.get(VARIABLE):
        raise ConfigError(
            VARIABLE, os.environ[VARIABLE], "overrides which kernels are compared", "unset it, use --only"
        )
    people = chosen(contenders(llama_cpp=options.llama_cpp), options.only, options.skip)
    known = {result.cell: result for result in earlier}
    threads_before = torch.get_num_threads()
    run = BenchRun(results=[known[cell] for cell in cells if cell in known and _covers(known[cell], people, options)])
    done = {result.cell for result in run.results}
    run.missing = [cell for cell in cells if cell not in done]
    layers, models = Layers(options.seed), Models(options.model, options.seed)
    deadline = math.inf if options.time_limit is None else time.monotonic() + options.time_limit
    try:
        for cell in list(run.missing):
            if time.monotonic() > deadline:
                raise TimeUp
            if cell.threads:
                torch.set_num_threads(cell.threads)
            tell(cell, "measuring bandwidth and GEMM rate")
            before = measure_rates(cell.torch_dtype, cell.device, quick=options.quick)
            result = CellResult.empty(cell, people, before)
            try:
                _measure(result, people, layers, models, options, deadline, lambda text, cell=cell: tell(cell, text))
                # What neighbours leave of the memory's bandwidth changes within minutes.
                tell(cell, "measuring bandwidth and GEMM rate again")
                result.rates = before.between(measure_rates(cell.torch_dtype, cell.device, quick=options.quick))
            finally:
                if any(row.measured for row in result.rows) or result.finished:
                    run.results.append(result)
                    keep(result)
            run.missing.remove(cell)
    except KeyboardInterrupt:
        run.stopped = "interrupted"
    except TimeUp:
        run.stopped = "time limit"
    finally:
        models.clear()
        torch.set_num_threads(threads_before)
    return run


def _measure(
    result: CellResult,
    people: Sequence[Contender],
    layers: Layers,
    models: Models,
    options: Options,
    deadline: float,
    tell: Callable[[str], None],
) -> None:
    """Fill in `result`, having let go of the weights that this case does not need."""
    kind = result.cell.kind
    result.facts |= {"rounds": options.rounds, "seed": options.seed}
    if kind.model or not kind.timed:
        layers.clear()
    if not kind.model:
        models.clear()
    if kind.model:
        measure_model(result, people, models, options, deadline, tell)
    elif kind.timed:
        measure_layer(result, people, layers, options, deadline, tell)
    else:
        measure_memory(result, people, options, deadline, tell)


def _covers(result: CellResult, people: Sequence[Contender], options: Options) -> bool:
    """Whether an earlier result has all that is asked for."""
    if not result.finished or result.facts["seed"] != options.seed or result.facts["rounds"] < options.rounds:
        return False
    if result.cell.kind.model and any(
        result.facts[name] != value for name, value in dataclasses.asdict(options.model).items()
    ):
        return False
    have = {row.name for row in result.rows}
    return all(person.name in have for person in people if person.takes(result.cell))


def chosen(people: Sequence[Contender], only: Sequence[str], skip: Sequence[str]) -> list[Contender]:
    """Those whose name matches a pattern of `only` (all, if it is empty) and none of `skip`.

    Raises:
        ConfigError: for a pattern that matches nobody.
    """
    names = list(dict.fromkeys(person.name for person in people))
    for option, patterns in (("--only", only), ("--skip", skip)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise ConfigError(option, pattern, "matches no contender", f"choose from {', '.join(names)}")

    def wanted(name: str) -> bool:
        return (not only or any(fnmatch.fnmatch(name, pattern) for pattern in only)) and not any(
            fnmatch.fnmatch(name, pattern) for pattern in skip
        )

    return [person for person in people if wanted(person.name)]
