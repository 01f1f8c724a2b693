"""The page, its numbers and plot, and two runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesaic.bench import Cell, CellResult, Row, Saved, Shape, Store, changes, write_page
from moesaic.bench import table as tables
from moesaic.bench.plot import draw
from moesaic.bench.rates import Rates
from moesaic.bench.work import Work

SHAPE = Shape(1024, 512, 64, 8)


def result(case: str = "decode", ours: float = 2e-3, threads: int = 1) -> CellResult:
    rows = [
        Row("dense-wide", "dense", "measured", samples=[1e-3, 1e-3, 1e-3]),
        Row("moesaic:native", "moesaic", "measured", note="chosen by auto", default=True, samples=[ours] * 3),
        Row("moesaic:loop", "moesaic", "measured", samples=[1.9e-3]),
        Row("transformers:eager", "transformers", "measured", samples=[5e-3, 4e-3, 7e-3]),
        Row("transformers:grouped_mm", "transformers", "failed", reason="ValueError: no"),
        Row("transformers:sonicmoe", "transformers", "unavailable", reason="needs a CUDA device"),
    ]
    cell = Cell(case, SHAPE, "bf16", 1, threads, "balanced", "cpu")
    # Floor 1 ms: 2e7 bytes at 2e10 bytes a second.
    return CellResult(cell, Work(1e6, 2e7, 1.9e7), Rates(2e10, 1e11, "torch sum"), rows, {}, True)


def test_ratios_of_a_row() -> None:
    found = result()
    [ours] = [row for row in found.rows if row.name == "moesaic:native"]
    assert found.floor == pytest.approx(1e-3)
    # 1.9e7 bytes of weights in 2 ms are 9.5 GB/s, 48 % of 20.
    assert tables.values(found, ours) == ["moesaic:native", "2.00", "0.00", "2.00", "0.40", "2.00", "9.5", "48%"]
    assert tables.remarks(found) == [
        "moesaic:native: chosen by auto",
        "transformers:grouped_mm: failed: ValueError: no",
        "transformers:sonicmoe: unavailable: needs a CUDA device",
    ]


def test_what_counts_as_ours_is_what_auto_chooses() -> None:
    found = result()
    assert found.ours is not None
    assert found.ours.name == "moesaic:native"
    for row in found.rows:
        row.default = False
    assert found.ours.name == "moesaic:loop"


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    store = Store(tmp_path / "bench.json", "a machine of note", "moesaic bench --case decode")
    store.keep(result())
    store.keep(result(threads=2))
    page = write_page(store.path, tmp_path / "docs").read_text(encoding="utf-8")
    assert "moesaic bench --case decode\n" in page
    assert "Measured on a machine of note." in page
    row = "| d1024-f512-n64-k8 | bf16 | 1 | 1 | 1.00 | 1.00 | 2.00 (native) | 5.00 (eager) | 2.00 | 0.40 | 2.00 | 48% |"
    assert row in page
    assert "## decode: d1024-f512-n64-k8, bf16, 1 token, 2 threads" in page
    assert "- transformers:grouped_mm: failed: ValueError: no" in page
    content = json.loads((tmp_path / "docs" / "kernels.json").read_text(encoding="utf-8"))
    assert content["results"][0]["rows"][3]["median"] == 5e-3
    tables_of_page = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.count("|") in (13, 9) for line in tables_of_page)


def test_the_plot_is_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert draw([result(), result("forward")], tmp_path / "a.svg")
    assert draw([result(), result("forward")], tmp_path / "b.svg", png=False)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert not (tmp_path / "b.png").exists()
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    for part in ("moesaic:native", "transformers:eager", "decode", "forward", "d1024-f512-n64-k8, bf16, 1 token"):
        assert part in text


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert not draw([], tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_side_by_side() -> None:
    before = Saved("a machine", results={found.cell: found for found in (result(), result("forward"))})
    now = Saved("a machine", results={found.cell: found for found in (result(ours=1e-3), result("prefill"))})
    found = {change.name: change.ratio for change in changes(before, now)}
    assert found == {"dense-wide": 1, "moesaic:native": 0.5, "moesaic:loop": 1, "transformers:eager": 1}
