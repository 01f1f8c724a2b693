"""`moesaic eval --task`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Cli


def test_a_task_with_a_vote_and_a_comparison(cli: Cli, trained: Path, task: Path, tmp_path: Path) -> None:
    greedy, voted = tmp_path / "greedy.jsonl", tmp_path / "voted.jsonl"
    first = cli("eval", trained, "--task", task, "-o", greedy, "--json")
    assert first.code == 0, first.err
    found = json.loads(first.out)["own_tasks"]["sums"]
    assert found["items"] == 6
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
    assert "domains" not in json.loads(first.out)
    options = ("--task", task, "--samples", "3", "--vote", "weighted", "-o", voted, "--compare", greedy)
    ended = cli("eval", trained, *options, "--json")
    assert ended.code == 0, ended.err
    compared = json.loads(ended.out)["own_tasks"]["sums"]["compared"]
    assert compared["items"] == 6
    assert len(voted.read_text(encoding="utf-8").splitlines()) == 6
    printed = cli("eval", trained, *options)
    assert "McNemar" in printed.out
    assert "unanswered" in printed.out
    other = cli("eval", trained, *options, "--seed", "5")
    assert other.code == 2
    assert "other settings" in other.err


def test_bad_options_are_named(cli: Cli, trained: Path, task: Path, tmp_path: Path) -> None:
    for options, message in [
        (["--samples", "3"], "--samples"),
        (["--task", task, "--samples", "3", "--temperature", "0"], "--temperature = 0 makes all samples equal"),
        (["--task", tmp_path / "none.jsonl"], "is not a file"),
        (["--task", task, "--task", task], "is the name of two files"),
        (["--task", task, "-o", tmp_path], "is a folder"),
    ]:
        ended = cli("eval", trained, *options)
        assert ended.code == 2, ended.out
        assert message in " ".join(ended.err.split())
