"""`moesaic catalog`: lists, filters, shows and builds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from tests.cli.conftest import Cli
from transformers import AutoModelForCausalLM

from moesaic.catalog import mechanisms, model, models, preset, presets
from moesaic.cli.catalog import app
from moesaic.cli.catalog.build import run_of
from moesaic.layer import MoESpec
from moesaic.train import RunConfig

COMMANDS = [command.name for command in app.registered_commands]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as on a wide terminal, so that no cell is cut."""
    from moesaic.cli.console import results

    monkeypatch.setattr(results, "_width", 250)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(cli: Cli, command: str) -> None:
    ended = cli("catalog", command, "--help")
    assert ended.code == 0
    text = " ".join(re.sub(r"[│╭╰─╮╯]", " ", ended.out).split())
    assert f"Example: moesaic catalog {command} " in text
    assert "--json" in text


def names(out: str, key: str) -> list[str]:
    return [entry["name"] for entry in json.loads(out)[key]]


def test_models_are_filtered_and_sorted(cli: Cli) -> None:
    assert len(names(cli("catalog", "models", "--json").out, "models")) == len(models())
    wanted = ("--min-total", "10B", "--router", "softmax_topk", "--buildable", "--sort", "active")
    out = cli("catalog", "models", *wanted, "--json").out
    rows = json.loads(out)["models"]
    assert all(row["parameters"]["total"] >= 10e9 and row["buildable"] for row in rows)
    assert all(row["router"]["kind"] == "softmax_topk" for row in rows)
    active = [row["parameters"]["active"] for row in rows]
    assert active == sorted(active, reverse=True)
    assert rows[0]["name"] == "glam-64b-64e"
    small = names(cli("catalog", "models", "--max-total", "100M", "--json").out, "models")
    assert small == [name for name in presets() if name.startswith("tiny-")]
    assert names(cli("catalog", "models", "--router", "attention", "--json").out, "models") == ["yuan2-m32"]
    assert names(cli("catalog", "models", "--search", "mamba", "--not-buildable", "--json").out, "models") == [
        "jamba-v0.1"
    ]


def test_models_that_cannot_be_counted_are_filtered_by_what_is_printed(cli: Cli) -> None:
    largest = cli("catalog", "models", "--min-total", "1T", "--sort", "total")
    assert "switch-c-2048" in largest.out
    assert "(1.57T)" in largest.out
    assert "2 models" in largest.out


def test_mechanisms_are_filtered(cli: Cli) -> None:
    assert len(names(cli("catalog", "mechanisms", "--json").out, "mechanisms")) == len(mechanisms())
    merged = cli("catalog", "mechanisms", "--branch", "gating/soft/expert-merging", "--have", "--json").out
    assert names(merged, "mechanisms") == ["smear", "lory", "meo"]
    lacking = json.loads(cli("catalog", "mechanisms", "--branch", "gating", "--missing", "--json").out)["mechanisms"]
    assert {entry["decision"] for entry in lacking} == {"partly", "planned", "missing", "out_of_scope"}
    found = cli("catalog", "mechanisms", "--search", "HASH of the token")
    assert "hash-layer" in found.out
    assert "routers/hash.md" in found.out
    assert "1 mechanisms: 1 implemented" in found.out


def test_losses_are_listed(cli: Cli) -> None:
    assert {"router_z", "expert_balance_seq"} <= set(names(cli("catalog", "losses", "--json").out, "losses"))
    assert "E Σ_i f_i P_i" in cli("catalog", "losses").out


def test_show_gives_a_model_and_what_it_costs(cli: Cli) -> None:
    out = json.loads(cli("catalog", "show", "deepseek-v3", "--dtype", "fp8", "--context-length", "1024", "--json").out)
    size = model("deepseek-v3").size()
    found = out["model"]["size"]
    assert found["parameters"] == {"total": size.total, "active": size.active}
    assert found["flops_per_token"] == size.flops_per_token(1024)
    assert found["weight_bytes"] == size.total
    assert found["cache_bytes_per_token"] == 61 * 576
    assert out["model"]["published"]["total"]["billions"] == 671
    assert out["mechanism"] is None
    text = cli("catalog", "show", "deepseek-v3").out
    for part in ("671.03B", "671.00B", "without input embedding: 36.62B", "1.3 TB in bf16", "70.3 kB a token"):
        assert part in text


def test_show_says_why_a_model_cannot_be_counted_or_built(cli: Cli) -> None:
    text = cli("catalog", "show", "jamba-v0.1").out
    assert "no term for Mamba layers" in text
    assert "It can't be built" in text
    assert "Near are mixtral-8x7b" in text
    assert json.loads(cli("catalog", "show", "jamba-v0.1", "--json").out)["model"]["size"] is None


def test_show_gives_mechanisms_losses_and_both(cli: Cli) -> None:
    both = json.loads(cli("catalog", "show", "yuan2-m32", "--json").out)
    assert both["model"]["title"] == "Yuan 2.0-M32"
    assert both["mechanism"]["files"] == ["layer/routers/attention.py"]
    text = cli("catalog", "show", "x-moe").out
    assert "s_i = (W h).e_i" in text
    fragment = yaml.safe_load(text[text.index("moe:\n") :])
    MoESpec.from_dict({"experts": {"num_experts": 8, "intermediate_size": 8}, **fragment["moe"]})
    assert "max(0, τ - H(mean p))" in cli("catalog", "show", "entropy").out


def test_built_run_trains(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    made = json.loads(cli("catalog", "build", "deepseek-v3", "--shrink", "-o", file, "--json").out)
    assert made["parameters"]["total"] < 3e6
    few = (
        "train.steps=2",
        "data.sources.0.max_bytes=150000",
        "data.sequence_length=32",
        "data.validation_fraction=0.15",
    )
    trained = json.loads(cli("train", file, "-o", tmp_path / "out", *(f"--set={one}" for one in few), "--json").out)
    assert (trained["step"], trained["finished"]) == (2, True)


@pytest.mark.parametrize("small", [True, False])
def test_runs_say_what_presets_say(small: bool) -> None:
    for name in presets():
        found = preset(name).shrink() if small else preset(name)
        run = RunConfig.from_dict(run_of(found, small=small))
        assert run.moe == found.moe


def test_built_file_says_what_is_otherwise_and_inspects(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "grok.yaml"
    assert cli("catalog", "build", "grok-1", "-o", file).code == 0
    assert "# Built otherwise: Logits are not multiplied" in file.read_text(encoding="utf-8")
    assert json.loads(cli("inspect", file, "--json").out)["parameters"]["total"] == pytest.approx(315.7e9, rel=1e-3)


def test_built_folder_is_a_model(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert cli("catalog", "build", "qwen3-30b-a3b", "--shrink", "-o", folder).code == 0
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.spec.router == preset("qwen3-30b-a3b").shrink().moe.router
    refused = cli("catalog", "build", "qwen3-30b-a3b", "--shrink", "-o", folder)
    assert refused.code == 2
    assert "exists" in refused.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "deepseekmoe-16"), "did you mean 'deepseekmoe-16b'"),
        (("show", "mixtral-8x7b", "--dtype", "float64"), "choose one of fp32, bf16"),
        (("mechanisms", "--branch", "gates"), "is not a branch"),
        (("models", "--min-total", "many"), "write it as 10B or 700M"),
        (("models", "--router", "magic"), "choose one of attention"),
        (("build", "switch-c-2048", "-o", "x.yaml"), "it is an encoder-decoder"),
        (("build", "deepseek-v3", "-o", "x"), "add --shrink"),
    ],
)
def test_bad_input_is_named(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = cli("catalog", *arguments)
    assert ended.code == 2
    assert message in " ".join(ended.err.split())
    assert not list(tmp_path.iterdir())
