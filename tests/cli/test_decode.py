"""`--decode` of `moesaic generate` and `moesaic eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Cli
from transformers import AutoTokenizer

from moesaic.train import CheckpointStore

OPTIONS = ("-p", "The", "--max-new-tokens", "6")


def generated(cli: Cli, trained: Path, *more: object) -> dict[str, Any]:
    ended = cli("generate", trained, *OPTIONS, *more, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def test_generate_by_decoding(cli: Cli, trained: Path) -> None:
    plain = generated(cli, trained, "--temperature", "0")
    assert "decoding" not in plain
    greedy = generated(cli, trained, "--decode", "greedy")
    assert greedy["text"] == plain["text"]
    assert greedy["decoding"] == "greedy"
    assert generated(cli, trained, "--decode", "greedy override=k=2")["text"] == plain["text"]
    assert generated(cli, trained, "--decode", "self-contrast beta=0")["text"] == plain["text"]
    for text in ("self-contrast alpha=0.001 beta=4", "self-contrast alpha=0.001 beta=4 plan=two_passes"):
        contrasted = generated(cli, trained, "--decode", text)
        assert contrasted["forward_positions"] == 2 * greedy["forward_positions"]
        assert contrasted["decoding"] == text
        streamed = cli("generate", trained, *OPTIONS, "--decode", text)
        assert streamed.out == contrasted["text"] + "\n"
        assert "tokens/s" in streamed.err


def test_generate_fills_in_what_a_decoding_leaves_open(cli: Cli, trained: Path) -> None:
    options = ("--decode", "self-contrast", "--temperature", "0.9", "--top-p", "0.9", "--seed", "3")
    sampled = generated(cli, trained, *options)
    assert sampled["decoding"] == "self-contrast temperature=0.9 top_p=0.9"
    assert generated(cli, trained, *options)["text"] == sampled["text"]
    assert generated(cli, trained, *options[:-1], "4")["text"] != sampled["text"]
    beams = generated(cli, trained, "--decode", "self-contrast", "--num-beams", "2")
    assert beams["decoding"] == "self-contrast num_beams=2"


def test_generate_with_a_routing_around_and_a_trace(cli: Cli, trained: Path, tmp_path: Path) -> None:
    found = generated(cli, trained, "--decode", "self-contrast", "--override", "k=3", "--trace", tmp_path / "trace")
    assert found["trace"]["tokens"] == found["forward_positions"]
    assert json.loads(cli("trace", tmp_path / "trace", "--json").out)["layers"]["0"]["top_k"] == 3


def test_an_amateur_is_a_model_like_any_other(cli: Cli, trained: Path, task: Path, tmp_path: Path) -> None:
    """A model set against itself says what it always does."""
    plain = generated(cli, trained, "--decode", "greedy")
    contrasted = generated(cli, trained, "--decode", f"contrastive amateur={trained}")
    assert contrasted["text"] == plain["text"]
    assert contrasted["forward_positions"] == 2 * plain["forward_positions"]
    assert generated(cli, trained, "--decode", "dola")["forward_positions"] == plain["forward_positions"]
    one = generated(cli, trained, "--decode", "contrastive-search k=1 penalty=0.6")
    assert one["text"] == plain["text"]
    options = ("--task", task, "-o", tmp_path / "results", "--limit", "3")
    assert evaluated(cli, trained, *options, "--decode", f"contrastive amateur={trained}")["own_tasks"]["sums"]
    missing = cli("generate", trained, *OPTIONS, "--decode", "contrastive amateur=./nowhere")
    assert missing.code == 2
    assert "amateur = './nowhere' is not a folder" in missing.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decode", "self-contrast weak=rank=9"], "rank = 9 is more than the 8 experts"),
        (["--decode", "self-contrast beta=-1"], "decode.beta = '-1' is not valid"),
        (["--decode", "greedy override=k=4@7"], "k.layers = 7 is a layer without a router; routers are in [0, 1]"),
        (["--decode", "self-contrast bta=1"], "did you mean 'beta'?"),
        (["--decode", "greedy", "--temperature", "0.7"], "temperature = 0.7 is another than that of the decoding, 0.0"),
        (["--decode", "greedy override=k={1..8}"], "is a grid"),
        (["--decode", "self-contrast", "--top-p", "0.9"], "decode.top_p = 0.9 is for sampling"),
    ],
)
def test_generate_names_mistakes(cli: Cli, trained: Path, options: list[str], message: str) -> None:
    ended = cli("generate", trained, *OPTIONS, *options)
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert message in " ".join(ended.err.split())


def evaluated(cli: Cli, trained: Path, *options: object) -> dict[str, Any]:
    ended = cli("eval", trained, *options, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_eval_by_decoding(cli: Cli, trained: Path, task: Path, tmp_path: Path) -> None:
    def rows(name: str, *options: object) -> list[dict[str, Any]]:
        evaluated(cli, trained, "--task", task, "-o", tmp_path / name, *options)
        return [{**row, "run": "", "seconds": 0} for row in rows_of(tmp_path / name)]

    plain = rows("plain")
    assert rows("greedy", "--decode", "greedy") == plain
    assert rows("routed", "--decode", "greedy override=k=3") == rows(
        "around", "--decode", "greedy", "--override", "k=3"
    )
    contrasted = rows("contrast", "--decode", "self-contrast alpha=0.001 beta=4")
    for row, other in zip(plain, contrasted, strict=True):
        if row["type"] == "choice":
            assert row["log_likelihoods"] != other["log_likelihoods"]
    assert [row.get("samples") for row in plain] != [row.get("samples") for row in contrasted]
    same = cli(
        "eval", trained, "--task", task, "-o", tmp_path / "contrast", "--decode", "self-contrast alpha=0.001 beta=3"
    )
    assert same.code == 2
    assert "other settings" in same.err
    printed = cli(
        "eval", trained, "--task", task, "-o", tmp_path / "contrast", "--decode", "self-contrast alpha=1e-3 beta=4"
    )
    assert "Decoding: self-contrast alpha=0.001 beta=4" in printed.out


def test_eval_votes_over_a_decoding(cli: Cli, trained: Path, task: Path, tmp_path: Path) -> None:
    options = ("--task", task, "--samples", "3", "--decode", "self-contrast")
    found = evaluated(cli, trained, *options, "--vote", "weighted", "-o", tmp_path / "first")
    assert found["decoding"] == "self-contrast temperature=0.7"
    drawn = [row["samples"] for row in rows_of(tmp_path / "first") if row["type"] == "generate"]
    assert any(len({sample["text"] for sample in samples}) > 1 for samples in drawn)
    warm = evaluated(cli, trained, *options, "--temperature", "0.9", "--top-p", "0.8")
    assert warm["decoding"] == "self-contrast temperature=0.9 top_p=0.8"


def only(task: Path, kind: str) -> Path:
    lines = task.read_text(encoding="utf-8").splitlines()
    path = task.parent / f"{kind}.jsonl"
    path.write_text(
        "\n".join(line for line in lines if "defaults" in line or (kind == "choices") == ("choices" in line))
    )
    return path


def test_eval_names_what_would_not_be_used(cli: Cli, trained: Path, task: Path) -> None:
    choices, texts = only(task, "choices"), only(task, "texts")
    unused = "is for generated answers, and all are multiple choice"
    for options, message in [
        (["--task", choices, "--decode", "sample temperature=0.5"], f"decode.temperature = 0.5 {unused}"),
        (["--task", choices, "--decode", "beam num_beams=2"], f"decode.num_beams = 2 {unused}"),
        (["--task", choices, "--decode", "self-contrast alpha=0.5"], f"decode.alpha = 0.5 {unused}"),
        (["--decode", "greedy"], "--decode = 'greedy' is only for tasks"),
        (
            ["--task", texts, "--samples", "3", "--decode", "contrastive-search"],
            "--samples = 3 of 'contrastive-search' are",
        ),
        (["--task", texts, "--samples", "3", "--decode", "greedy"], "--samples = 3 of 'greedy' are all equal"),
        (
            ["--task", texts, "--decode", "self-contrast temperature=0.5", "--temperature", "0.6"],
            "temperature = 0.6 is another",
        ),
        (["--task", texts, "--decode", "self-contrast weak=rank=9"], "rank = 9 is more than the 8 experts"),
        (["--task", texts, "--decode", "self-contrast beta=-1"], "decode.beta = '-1' is not valid"),
        (["--task", texts, "--decode", "greedy override=k=4@5"], "k.layers = 5 is a layer without a router"),
    ]:
        ended = cli("eval", trained, *options)
        assert ended.code == 2, (options, ended.out)
        assert ended.err.startswith("error: ")
        assert message in " ".join(ended.err.split())
    assert cli("eval", trained, "--task", choices, "--decode", "self-contrast beta=0.5").code == 0
    unscored = cli("eval", trained, "--task", choices, "--decode", "dola")
    assert unscored.code == 2
    assert "decode = 'early_exit' does not score given texts; generate answers with it" in " ".join(
        unscored.err.split()
    )


def test_eval_names_faults_of_tasks_and_tokenizers(cli: Cli, trained: Path, task: Path, tmp_path: Path) -> None:
    task.write_text('{"prompt": "1 + 1 =", "answer": "2", "pattern": "[0-9]+"}\n')
    ended = cli("eval", trained, "--task", task, "--decode", "self-contrast")
    assert ended.code == 2
    assert "line 1: pattern = '[0-9]+' has no group; put the answer in brackets" in " ".join(ended.err.split())
    task.write_text('{"prompt": "1 + 1 =", "answer": "2", "preset": "last_number"}\n')
    latest = CheckpointStore(trained / "checkpoints", keep=1).latest()
    assert latest is not None
    tokenizer = AutoTokenizer.from_pretrained(latest)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "unpadded")
    ended = cli("eval", trained, "--task", task, "--decode", "self-contrast", "--tokenizer", tmp_path / "unpadded")
    assert ended.code == 2
    assert "tokenizer.pad_token = None is missing" in " ".join(ended.err.split())
