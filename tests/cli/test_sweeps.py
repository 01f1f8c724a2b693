"""`moesaic eval` with several decodings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Cli


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{n} plus {n} is", "choices": [f" {2 * n}", " x"], "answer": "A"} for n in range(4)]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_decodings_are_compared_drawn_and_chosen(cli: Cli, trained: Path, task: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "swept"
    grid = ("--decode", "greedy", "--decode", "self-contrast weak=rank={1,2} beta={0.1,0.5}", "--task", task)
    ended = cli("eval", trained, *grid, "-o", folder, "--no-timing", "--limit", "3")
    assert ended.code == 0, ended.err
    printed = " ".join(ended.out.split())
    assert "self-contrast" in printed
    assert "McNemar" in printed
    report = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    assert report["axis"] == "bytes"
    assert [point["items"] for point in report["points"]] == [3] * 5
    assert report["points"][1]["cost"]["positions"] == 2
    assert {path.name for path in folder.glob("*.svg")} == {"sweep.svg", "sweep-grid.svg"}
    assert len(list(folder.glob("results/*.jsonl"))) == 5
    picture = tmp_path / "page.html"
    choosing = ("--choose", task, "--picture", picture, "--cost", "positions", "--no-timing", "--json")
    ended = cli("eval", trained, *grid, *choosing)
    assert ended.code == 0, ended.err
    chosen = json.loads(ended.out)["sweep"]
    assert (chosen["overlap"], chosen["pictures"]) == (4, [str(picture)])
    assert chosen["chosen"] == chosen["test"]["points"][-1]["decoding"]
    assert "4 of 4 items of --task are items of --choose too" in " ".join(ended.err.split())
    assert "<svg" in picture.read_text(encoding="utf-8")


def test_bad_options_are_named(cli: Cli, trained: Path, task: Path, tmp_path: Path) -> None:
    two = ("--decode", "greedy override=k={1,2}")
    for options, message in [
        (["--task", task, "--choose", task], "--choose = 'given' is for several decodings"),
        (["--task", task, "--no-timing"], "--no-timing = 'given' is for several decodings"),
        ([*two], "give --task FILE.jsonl"),
        ([*two, "--task", task, "--trace", tmp_path / "trace"], "--trace = 'given' does not go with several decodings"),
        ([*two, "--task", task, "-o", task], "is a file"),
        ([*two, "--task", task, "--cost", "seconds", "--no-timing"], "are not measured with --no-timing"),
        ([*two, "--task", task, "--picture", "a.gif"], "has no known ending"),
    ]:
        ended = cli("eval", trained, *options)
        assert ended.code == 2, ended.out
        assert message in " ".join(ended.err.split())
