"""Whole comparisons of tiny layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.bench import CASES, Cell, CellResult, Options, Shape, Store, inputs, read, run_bench
from moesaic.bench import run as runner
from moesaic.bench.contenders import Contender, Entry, LayerContender, LayerEntry, contenders
from moesaic.bench.inputs import Call, LayerInputs
from moesaic.bench.rates import Rates
from moesaic.errors import ConfigError, DataError
from moesaic.layer.kernels import KERNELS, run_experts

SHAPE = Shape(16, 8, 4, 2)
LAYER_CASES = [name for name, case in CASES.items() if not case.model and case.timed]
FAST = Options(rounds=2, patience=0.1)


@pytest.fixture(autouse=True)
def _small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "cache_bytes", lambda device: 4096)
    monkeypatch.setattr(runner, "measure_rates", lambda dtype, device, quick: Rates(1e10, 1e11, "test"))


def cell(case: str, dtype: str = "f32") -> Cell:
    return Cell(case, SHAPE, dtype, 4, 1, "balanced", "cpu")


class Custom(LayerContender):
    """A contender made of a function."""

    family = "moesaic"

    def __init__(self, name: str, forward: Callable[[Call], Tensor]) -> None:
        self.name, self.forward = name, forward

    def enter(self, cell: Cell, inputs: LayerInputs) -> Entry:
        return LayerEntry(cell, inputs.calls, self.forward)


def right(call: Call) -> Tensor:
    return run_experts("loop", call.weights, call.x_TD, call.index_TK, call.weight_TK)


def with_people(monkeypatch: pytest.MonkeyPatch, *people: Contender) -> None:
    monkeypatch.setattr(runner, "contenders", lambda llama_cpp: list(people))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("case", LAYER_CASES)
def test_everyone_who_can_run_here_is_right_and_measured(case: str, dtype: str) -> None:
    found = run_bench([cell(case, dtype)], FAST)
    [result] = found.results
    assert (found.missing, found.stopped, result.finished) == ([], None, True)
    status = {row.name: (row.status, row.reason) for row in result.rows}
    ours = {f"moesaic:{kernel.name}" for kernel in KERNELS}
    for name in ours | {"dense-chain", "dense-wide", "transformers:eager", "transformers:grouped_mm"}:
        assert name in status
    for name, (state, reason) in status.items():
        assert state == "measured" or (state == "unavailable" and reason), (name, state, reason)
    assert status["moesaic:loop"][0] == status["transformers:eager"][0] == "measured"
    assert [row.note for row in result.rows].count("chosen by auto") == 1


def test_a_wrong_contender_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_people(monkeypatch, Custom("right", right), Custom("wrong", lambda call: 1.1 * right(call)))
    [result] = run_bench([cell("forward")], FAST).results
    assert result.measured("right")
    row = result.row_of("wrong")
    assert (row.status, row.samples) == ("failed", [])
    assert "output is 0.1 away from the loop kernel's" in row.reason


def test_a_contender_that_raises_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(call: Call) -> Tensor:
        raise ValueError("out of luck")

    with_people(monkeypatch, Custom("right", right), Custom("raises", raises))
    [result] = run_bench([cell("forward")], FAST).results
    row = result.row_of("raises")
    assert (row.status, row.reason) == ("failed", "ValueError: out of luck")


def test_an_interruption_keeps_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupts(call: Call) -> Tensor:
        calls.append(call)
        if len(calls) == 200:
            raise KeyboardInterrupt
        return right(call)

    with_people(monkeypatch, Custom("right", right), Custom("interrupts", interrupts))
    kept: list[CellResult] = []
    wanted = [cell("forward"), cell("prefill")]
    found = run_bench(wanted, replace(FAST, rounds=9999, patience=1e6), keep=kept.append)
    assert (found.stopped, found.missing) == ("interrupted", wanted)
    assert [result.finished for result in kept] == [False]
    assert kept[0].row_of("right").samples


def test_a_time_limit_stops_the_run() -> None:
    found = run_bench([cell("forward")], replace(FAST, time_limit=0.0))
    assert (found.stopped, found.results) == ("time limit", [])


def test_finished_cells_are_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    store = Store(path, "a machine", "moesaic bench")
    [first] = run_bench([cell("forward")], FAST, keep=store.keep).results
    again = Store(path, "a machine", "moesaic bench")
    found = run_bench([cell("forward"), cell("decode")], FAST, earlier=again.results.values(), keep=again.keep)
    assert found.results[0].to_dict() == first.to_dict()
    assert set(read(path).results) == {cell("forward"), cell("decode")}
    with pytest.raises(ConfigError, match="holds results of a machine"):
        Store(path, "another machine", "moesaic bench")
    assert Store(path, "another machine", "moesaic bench", restart=True).results == {}


@pytest.mark.parametrize(
    "options",
    [replace(FAST, seed=1), replace(FAST, rounds=3), FAST],
    ids=["another seed", "more rounds", "somebody new"],
)
def test_a_cell_that_lacks_something_is_measured_again(monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    with_people(monkeypatch, Custom("right", right))
    [first] = run_bench([cell("forward")], FAST).results
    people = [Custom("right", right)] + ([Custom("new", right)] if options is FAST else [])
    with_people(monkeypatch, *people)
    [again] = run_bench([cell("forward")], options, earlier=[first]).results
    assert again is not first
    assert all(row.measured for row in again.rows)
    assert run_bench([cell("forward")], options, earlier=[again]).results[0] is again


def test_ratios_in_the_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "bench.json", "a machine", "moesaic bench")
    run_bench([cell("decode")], FAST, keep=store.keep)
    [result] = json.loads(store.path.read_text(encoding="utf-8"))["results"]
    rows = {row["name"]: row for row in result["rows"]}
    row, dense = rows["moesaic:loop"], rows["dense-wide"]
    assert row["over_dense"] == pytest.approx(row["median"] / dense["median"])
    stock = min(row["median"] for row in rows.values() if row["family"] == "transformers" and row["samples"])
    assert row["over_transformers"] == pytest.approx(row["median"] / stock)
    assert row["over_floor"] == pytest.approx(row["median"] / result["floor"])
    assert row["weight_bytes_per_second"] == pytest.approx(result["work"]["weight_bytes"] / row["median"])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"moesaic_bench": 99}', '{"moesaic_bench": 1, "machine": 1}'])
def test_a_file_that_holds_no_results(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"bench\.json"):
        read(path)


def test_patterns_choose_contenders() -> None:
    def names(only: tuple[str, ...] = (), skip: tuple[str, ...] = ()) -> list[str]:
        return [person.name for person in runner.chosen(contenders(), only, skip)]

    assert names(only=("dense-*",)) == ["dense-chain", "dense-wide", "dense-model"]
    assert names(only=("dense-*", "moesaic:loop"), skip=("dense-[wm]*",)) == ["dense-chain", "moesaic:loop"]
    with pytest.raises(ConfigError, match="--skip = 'llama' matches no contender; choose from dense-chain"):
        names(skip=("llama",))


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    run_bench([replace(cell("forward"), threads=before + 1)], FAST)
    assert torch.get_num_threads() == before


def test_the_variable_that_overrides_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_KERNEL", "loop")
    with pytest.raises(ConfigError, match="MOESAIC_KERNEL = 'loop' overrides which kernels are compared; unset it"):
        run_bench([cell("forward")], FAST)


def test_rates_are_the_mean_of_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([Rates(1e10, 3e11, "torch sum"), Rates(3e10, 1e11, "torch maximum")])
    monkeypatch.setattr(runner, "measure_rates", lambda dtype, device, quick: next(measured))
    (result,) = run_bench([cell("decode")], Options(rounds=2, only=["moesaic:grouped"])).results
    assert result.rates == Rates(2e10, 2e11, "torch sum")
