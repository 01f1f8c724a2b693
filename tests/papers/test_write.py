from __future__ import annotations

import csv
import importlib.util
import json
import re
from pathlib import Path

import pytest
from tests.papers.tiny import EXPERIMENT

from moesaic.errors import DataError
from moesaic.papers import EXPERIMENTS, Reproduction, write_docs, write_page
from moesaic.papers.write import index_of

DOCS = Path(__file__).parents[2] / "docs" / "reproductions"


def test_the_page_says_how_it_was_made_and_what_does_not_show(finished: Reproduction, tmp_path: Path):
    text = write_page(finished, tmp_path).read_text(encoding="utf-8")
    assert "moesaic reproduce tiny --size cpu --seeds 0,1\n" in text
    assert "The control is `moe`" in text
    assert "2 seeds (0, 1)" in text
    assert re.search(r"\| Losses are positive \| loss\(moe\) \| \+5\.\d{4} ± 0\.\d{4} \| \*\*holds\*\* \|", text)
    assert re.search(
        r"\| Losses are negative \| -loss\(moe\) \| -5\.\d{4} ± 0\.\d{4} \| \*\*does not hold\*\* \|", text
    )
    assert "Of another size" not in text
    assert "the first with a louder router; starts from `moe`" in text
    assert "It says nothing." in text
    assert "PyTorch" in text
    assert "seeds do not resolve it" in text.replace("\n", " ")
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))


def test_tables_hold_every_number(finished: Reproduction, tmp_path: Path):
    write_page(finished, tmp_path)
    rows = list(csv.DictReader((tmp_path / "tiny.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["arm"], row["seed"]) for row in rows[:4]] == [
        ("moe", "0"),
        ("dense", "0"),
        ("forked", "0"),
        ("moe", "1"),
    ]
    assert float(rows[0]["loss"]) == finished.results[0]["moe"].measurements["loss"]
    assert rows[1]["max_violation"] == ""
    content = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))
    assert content["arms"]["1"]["moe"]["measurements"] == finished.results[1]["moe"].measurements
    assert [claim["verdict"] for claim in content["claims"][1:]] == ["holds", "does not hold"]


def test_the_plot_is_the_same_for_the_same_numbers(finished: Reproduction, tmp_path: Path):
    pytest.importorskip("matplotlib")
    for folder in ("a", "b"):
        write_page(finished, tmp_path / folder)
    first, second = ((tmp_path / folder / "tiny.svg").read_bytes() for folder in ("a", "b"))
    assert first == second
    assert first.startswith(b"<?xml")


def test_without_matplotlib_the_page_says_so(finished: Reproduction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    text = write_page(finished, tmp_path).read_text(encoding="utf-8")
    assert "There is no plot: matplotlib was missing" in text
    assert not (tmp_path / "tiny.svg").exists()


def test_a_part_of_a_reproduction_has_no_page(finished: Reproduction, tmp_path: Path):
    part = Reproduction(EXPERIMENT, "cpu", (0, 1), (), tmp_path, finished.arms, 1, results={0: finished.results[0]})
    with pytest.raises(DataError, match="tiny is not finished"):
        write_page(part, tmp_path)


def test_the_index_lists_what_was_run_and_what_was_not(finished: Reproduction, tmp_path: Path):
    before = index_of(tmp_path)
    assert all(f"| `{name}` |" in before for name in EXPERIMENTS)
    assert "not run yet" in before
    write_docs(finished, tmp_path)
    result = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))
    (tmp_path / "deepseekmoe.json").write_text(json.dumps(result), encoding="utf-8")
    after = index_of(tmp_path)
    assert re.search(r"\| \[`deepseekmoe`\]\(deepseekmoe\.md\) \| .* \| 1 holds, .*1 does not hold", after)


def test_the_index_of_the_documentation_is_current():
    assert (DOCS / "index.md").read_text(encoding="utf-8") == index_of(DOCS)
