"""`moesaic plan`: what it prints, that its answer can be pasted, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tests.cli.conftest import RUN, Cli

from moesaic.dist import Layout
from moesaic.train import RunConfig


def test_the_best_layout_can_be_pasted(cli: Cli, run_file: Path) -> None:
    ended = cli("plan", run_file, "--hosts", "2", "--gpus", "2", "--memory", "1GB")
    assert ended.code == 0, ended.err
    for part in ("Layouts of 4 ranks that fit", "peak", "compute + exposed", "gather dense"):
        assert part in ended.out
    section = yaml.safe_load(ended.out[ended.out.index("parallel:") :])
    run = RunConfig.from_dict({**RUN, **section})
    assert Layout.of(run.parallel, 4, run.moe).world == 4


def test_json_lists_every_layout_best_first(cli: Cli, run_file: Path) -> None:
    found = json.loads(cli("plan", run_file, "--gpus", "4", "--memory", "4MB", "--headroom", "0", "--json").out)
    fitting = [layout for layout in found["layouts"] if layout["fits"]]
    others = [layout for layout in found["layouts"] if not layout["fits"]]
    assert fitting
    assert found["layouts"] == fitting + others
    assert [layout["seconds"] for layout in fitting] == sorted(layout["seconds"] for layout in fitting)
    assert found["parallel"] == {name: fitting[0][name] for name in ("dp_replicate", "dp_shard", "ep", "esp")}
    assert all(layout["memory"]["peak"] <= 4e6 for layout in fitting)
    sizes = {(layout["dp_replicate"], layout["dp_shard"], layout["ep"], layout["esp"]) for layout in found["layouts"]}
    assert {(1, 4, 1, 1), (4, 1, 1, 1), (1, 4, 4, 1), (2, 2, 2, 2)} <= sizes
    assert all(layout["outer_bytes"] == 0 for layout in found["layouts"])


def test_one_device(cli: Cli, run_file: Path) -> None:
    found = json.loads(cli("plan", run_file, "--json").out)
    (only,) = found["layouts"]
    assert (only["fits"], only["flows"], only["memory"]["buffers"]) == (True, [], 0)
    assert only["seconds"] == only["compute_seconds"] > 0


def test_more_recomputation_needs_less_memory_and_more_time(cli: Cli, run_file: Path) -> None:
    plain, recomputed = (
        json.loads(cli("plan", run_file, "--set", f"train.gradient_checkpointing={flag}", "--json").out)["layouts"][0]
        for flag in ("false", "true")
    )
    assert recomputed["memory"]["activations"] < plain["memory"]["activations"]
    assert recomputed["seconds"] == pytest.approx(plain["seconds"] * 4 / 3)


def test_a_slow_link_between_hosts_keeps_experts_inside(cli: Cli, run_file: Path) -> None:
    options = ("--hosts", "2", "--gpus", "2", "--overlap", "0", "--json", "--set", "data.batch_size=64")
    slow = json.loads(cli("plan", run_file, *options, "--link", "1MB/s", "--inner-link", "1TB/s").out)
    best, worst = slow["layouts"][0], slow["layouts"][-1]
    assert best["outer_bytes"] < worst["outer_bytes"]
    assert best["ep"] <= 2


def test_memory_is_drawn(cli: Cli, run_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert cli("plan", run_file, "--gpus", "2", "--plot", tmp_path / "memory.svg").code == 0
    drawn = (tmp_path / "memory.svg").read_text(encoding="utf-8")
    assert "activations" in drawn
    assert "1x2 ep 2 esp 1" in drawn


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--memory", "80"), ("--memory = '80' is not a size", "80GB")),
        (("--memory", "80Gb"), ("--memory = '80Gb' is not a size",)),
        (("--link", "50GB"), ("--link = '50GB' is not a link", "50GB/s:10us")),
        (("--inner-link", "fast"), ("--inner-link = 'fast' is not a link",)),
        (("--flops", "many"), ("--flops = 'many' is not a rate", "200T")),
        (("--gpus", "3"), ("data.batch_size = 4 cannot be shared by 3 processes", "a multiple of 3")),
        (("--plot", "memory.pdf"), ("--plot = 'memory.pdf' is neither .svg nor .png",)),
        (("--set", "moe.router.top_k=9"), ("moe.router.top_k = 9 is larger",)),
        (
            ("--gpus", "4", "--set", "parallel.partition_embedding=true", "--set", "backbone.tie_word_embeddings=true"),
            ("parallel.partition_embedding = True does not go with tied embeddings",),
        ),
    ],
)
def test_bad_options_are_named(cli: Cli, run_file: Path, options: tuple[str, ...], parts: tuple[str, ...]) -> None:
    ended = cli("plan", run_file, *options)
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    for part in parts:
        assert part in ended.err


def test_when_nothing_fits_it_says_what_would(cli: Cli, run_file: Path) -> None:
    ended = cli("plan", run_file, "--gpus", "2", "--memory", "1MB")
    assert ended.code == 2
    assert "--memory = '1MB' is too little for every layout of 2 ranks; the least is " in ended.err
    assert "Layouts that do not fit" in ended.out
    assert "needs" in ended.out
    document = json.loads(cli("plan", run_file, "--gpus", "2", "--memory", "1MB", "--json").out)
    assert document["parallel"] is None
    assert all(layout["misfit"] for layout in document["layouts"])
