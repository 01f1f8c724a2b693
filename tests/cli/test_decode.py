"""`--decode` of `moesaic generate` and `moesaic eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Cli

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
