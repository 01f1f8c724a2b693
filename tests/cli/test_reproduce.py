from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from tests.cli.conftest import Cli
from tests.papers import tiny

from moesaic.papers import EXPERIMENTS
from moesaic.train import Trainer


def test_the_list_says_what_each_asks(cli: Cli):
    outcome = cli("reproduce", "--list")
    assert outcome.code == 0
    assert all(name in outcome.out for name in EXPERIMENTS)
    listed = json.loads(cli("reproduce", "--list", "--json").out)
    assert {entry["name"]: entry["sizes"] for entry in listed}["deepseekmoe"] == ["cpu", "gpu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["deepseekmeo"], "is not a reproduction; did you mean 'deepseekmoe'?"),
        (["deepseekmoe", "--size", "huge"], "is not a size of deepseekmoe; choose one of cpu, gpu"),
        (["deepseekmoe", "--seeds", "a,b"], "--seeds = 'a,b' is not a list of whole numbers"),
        (["deepseekmoe", "--seeds", "1,1"], "is not a list of different seeds"),
        (["deepseekmoe", "--set", "train.stepps=3"], "arms.gshard.train.stepps = 3 is not a known key"),
        (["deepseekmoe", "--set", "arms.nope.train.steps=3"], "names no arm of deepseekmoe"),
        (["deepseekmoe", "--jobs", "0"], "--jobs"),
    ],
)
def test_bad_input_leaves_nothing_behind(cli: Cli, tmp_path: Path, arguments: list[str], message: str):
    outcome = cli("reproduce", *arguments, "-o", tmp_path / "out")
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())
    assert not (tmp_path / "out").exists()


def test_a_reproduction_from_end_to_end(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(EXPERIMENTS, "tiny", tiny.EXPERIMENT)
    arguments = ["reproduce", "tiny", "--seeds", "0,1", "--jobs", "1", "-o", tmp_path / "out", "--set", "train.steps=2"]
    outcome = cli(*arguments, "--write-docs", tmp_path / "docs")
    assert outcome.code == 0, outcome.err
    assert "Losses are negative" in outcome.out
    assert "does not hold" in outcome.out
    assert "6/6" in outcome.err
    assert {path.name for path in (tmp_path / "docs").iterdir()} >= {"index.md", "tiny.md", "tiny.csv", "tiny.json"}
    assert "--set train.steps=2" in (tmp_path / "docs" / "tiny.md").read_text(encoding="utf-8")
    again = cli(*arguments, "--json")
    assert json.loads(again.out)["seeds"] == [0, 1]
    assert json.loads(again.out)["claims"][2]["verdict"] == "does not hold"
    fresh = cli(
        "reproduce",
        "tiny",
        "--seeds",
        "0",
        "--jobs",
        "1",
        "-o",
        tmp_path / "out",
        "--set",
        "train.steps=1",
        "--restart",
    )
    assert fresh.code == 0, fresh.err


def test_ctrl_c_ends_with_the_code_of_the_signal(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(EXPERIMENTS, "tiny", tiny.EXPERIMENT)
    step = Trainer.train_step

    def interrupted_step(trainer: Trainer):
        signal.raise_signal(signal.SIGINT)
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", interrupted_step)
    outcome = cli("reproduce", "tiny", "--seeds", "0", "--jobs", "1", "-o", tmp_path / "out")
    assert outcome.code == 130
    assert "Run the same command to go on" in outcome.err
    assert not list((tmp_path / "out").glob("*.md"))


def test_restart_refuses_a_folder_of_something_else(cli: Cli, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    outcome = cli("reproduce", "deepseekmoe", "-o", tmp_path, "--restart")
    assert outcome.code == 2
    assert "holds mine, which is no part of a reproduction" in " ".join(outcome.err.split())
    assert (tmp_path / "mine").is_dir()
