"""A tiny run that several commands look at, and a way to call the command line in this process."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.utils import logging as transformers_logging

from moesaic.cli import main

RUN = {
    "backbone": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "moe": {
        "experts": {"num_experts": 8, "intermediate_size": 16},
        "router": {"type": "top_k", "top_k": 2, "normalize_top_k": True},
        "balance": [{"type": "load_balancing", "coefficient": 0.01}],
    },
    "data": {
        "sources": [{"type": "python", "max_bytes": 150_000}],
        "tokenizer": {"type": "train_bpe", "vocab_size": 400},
        "sequence_length": 32,
        "batch_size": 4,
        "validation_fraction": 0.15,
    },
    "train": {"steps": 3, "eval_batches": 2},
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """Commands set up logging for a process of their own."""
    root, verbosity = logging.getLogger(), transformers_logging.get_verbosity()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """Run `moesaic ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["moesaic", *map(str, arguments)])
    capsys.readouterr()
    code: int | str | None = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    return Outcome(code if isinstance(code, int) else int(code is not None), captured.out, captured.err)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*arguments: object) -> Outcome:
        return call(monkeypatch, capsys, *arguments)

    return run


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a finished run."""
    from moesaic.train import RunConfig, train

    folder = tmp_path_factory.mktemp("trained") / "run"
    train(RunConfig.from_dict(RUN), folder, progress=False)
    return folder


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task of three generated answers and three choices."""
    rows: list[dict[str, Any]] = [{"defaults": {"preset": "last_number", "max_new_tokens": 4, "stop": ["\n"]}}]
    rows += [{"prompt": f"{n} plus {n} is", "answer": 2 * n} for n in range(3)]
    rows += [{"prompt": f"{n} plus {n} is", "choices": [f" {2 * n}", " x"], "answer": "A"} for n in range(3)]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path
