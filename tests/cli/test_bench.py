"""`moesaic bench` on tiny layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Cli

TINY = ("--shape", "d16-f8-n4-k2", "--tokens", "4", "--dtype", "f32", "--threads", "1", "--rounds", "2", "--quick")


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.bench.inputs.cache_bytes", lambda device: 4096)
    monkeypatch.setattr("moesaic.bench.rates.cache_bytes", lambda device: 1 << 20)


def test_tables_and_a_file_from_which_it_goes_on(cli: Cli, tmp_path: Path) -> None:
    arguments = ("bench", *TINY, "--case", "forward,decode", "-o", tmp_path)
    ended = cli(*arguments)
    assert ended.code == 0, ended.err
    for part in ("forward: d16-f8-n4-k2, f32, 4 tokens", "moesaic:grouped", "transformers:eager", "floor", "GB/s"):
        assert part in ended.out
    assert "transformers:sonicmoe, transformers:deepgemm: unavailable: needs a CUDA device" in ended.out
    before = (tmp_path / "bench.json").read_bytes()
    again = cli(*arguments)
    assert again.code == 0
    assert "moesaic:grouped" not in again.out
    assert (tmp_path / "bench.json").read_bytes() == before
    anew = cli(*arguments, "--restart", "--json")
    assert anew.code == 0
    assert (tmp_path / "bench.json").read_bytes() != before
    content = json.loads(anew.out)
    assert [result["cell"]["case"] for result in content["results"]] == ["forward", "decode"]
    assert (content["stopped"], content["missing"]) == (None, [])
    assert content["pages"] == [str(tmp_path / "kernels.md")]


def test_docs_and_an_earlier_run(cli: Cli, tmp_path: Path) -> None:
    first, second, docs = tmp_path / "first", tmp_path / "second", tmp_path / "docs"
    arguments = ("bench", *TINY, "--case", "forward", "--only", "moesaic:loop")
    assert cli(*arguments, "-o", first, "--llama-cpp", "/home/somebody/python").code == 0
    ended = cli(*arguments, "-o", second, "--compare", first / "bench.json", "--write-docs", docs)
    assert ended.code == 0, ended.err
    assert "Beside the earlier run" in ended.out
    assert sorted(path.name for path in docs.iterdir()) == ["kernels.json", "kernels.md", "kernels.svg"]
    text = (first / "kernels.md").read_text(encoding="utf-8")
    assert "--llama-cpp PYTHON" in text
    assert "somebody" not in text
    compared = json.loads(cli(*arguments, "-o", second, "--compare", first / "bench.json", "--json").out)
    [change] = compared["changes"]
    assert change["ratio"] == pytest.approx(change["after"] / change["before"])
    ended = cli(*arguments, "-o", second, "--compare", tmp_path / "nothing.json")
    assert ended.code == 2
    assert "nothing.json: No such file" in ended.err


def test_restart_keeps_what_was_not_asked_for(cli: Cli, tmp_path: Path) -> None:
    arguments = ("bench", *TINY, "--only", "moesaic:loop", "-o", tmp_path)
    assert cli(*arguments, "--case", "forward,decode").code == 0
    content = json.loads(cli(*arguments, "--case", "decode", "--restart", "--json").out)
    assert sorted(result["cell"]["case"] for result in content["results"]) == ["decode", "forward"]


def test_a_time_limit_says_what_is_left(cli: Cli, tmp_path: Path) -> None:
    ended = cli("bench", *TINY, "--case", "forward,decode", "--time-limit", "0", "-o", tmp_path)
    assert ended.code == 0
    assert "Stopped (time limit): 0 of 2 comparisons are finished" in ended.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--case", "backward"), ("--case = 'backward' is not a case", "forward-backward")),
        (("--shape", "mixtral"), ("--shape = 'mixtral'", "write it as d1024-f512-n64-k8")),
        (("--dtype", "fp8"), ("--dtype = 'fp8' is not a type", "f32, bf16, f16")),
        (("--tokens", "few"), ("--tokens = 'few' is not a list", "write them as 1,2")),
        (("--threads", "0"), ("--threads = '0' is not a list of positive", "1,2")),
        (("--routing", "mad"), ("--routing = 'mad' is not known", "balanced, skewed")),
        (("--device", "abacus"), ("--device = 'abacus' can't be used", "use cpu")),
        (("--only", "llama"), ("--only = 'llama' matches no contender", "moesaic:loop")),
    ],
)
def test_a_bad_option(cli: Cli, tmp_path: Path, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    ended = cli("bench", *arguments, "-o", tmp_path / "out")
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    for part in parts:
        assert part in ended.err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_what_is_measured(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic.bench.contenders.base import LayerEntry

    real, samples = LayerEntry.sample, []

    def interrupted(entry: LayerEntry) -> float:
        samples.append(entry)
        if len(samples) == 3000:
            raise KeyboardInterrupt
        return real(entry)

    monkeypatch.setattr(LayerEntry, "sample", interrupted)
    arguments = ("bench", *TINY, "--only", "moesaic:loop", "-o", tmp_path)
    ended = cli(*arguments, "--case", "decode,forward", "--rounds", "99999", "--patience", "99999")
    assert ended.code == 130
    assert "(interrupted)" in ended.out
    assert f"0 of 2 comparisons are finished, what was measured is in {tmp_path / 'bench.json'}" in ended.err
    content = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    [result] = content["results"]
    assert not result["finished"]
    assert result["rows"][0]["samples"]
    assert "(interrupted)" in (tmp_path / "kernels.md").read_text(encoding="utf-8")
