"""`moesaic inspect` with text: the page, checkpoints, comparisons, traces and files."""

from __future__ import annotations

import json
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import Cli
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

import moesaic
from moesaic.cli.models import load
from moesaic.errors import UnsupportedModel
from moesaic.train import CheckpointStore

PROMPTS = ("import os", "the other one")


def texts_of(page: Path) -> dict:
    html = page.read_text(encoding="utf-8")
    start = html.index('id="texts">') + len('id="texts">')
    return json.loads(html[start : html.index("</script>", start)])


def step_of(trained: Path) -> Path:
    latest = CheckpointStore(trained / "checkpoints", keep=1).latest()
    assert latest is not None
    return latest


def other_state(trained: Path, folder: Path, seed: int = 0) -> Path:
    """The trained model with other routers."""
    network, source = load(trained)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".gate." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    network.save_pretrained(folder)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_a_prompt_is_read_as_it_stands(cli: Cli, trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    options = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    ended = cli("inspect", trained, *options, "--report", page, "--json")
    assert ended.code == 0, ended.err
    texts = texts_of(page)
    shown = ["".join(texts["texts"][token] for token in document["tokens"]) for document in texts["documents"]]
    assert shown == list(PROMPTS)
    assert {document["domain"] for document in texts["documents"]} == {"prompt"}
    routing = json.loads(ended.out)["routing"]
    assert routing["header"]["layers"].keys() == routing["max_violation"].keys()
    assert routing["tables"]["load"]["columns"][0] == "layer"


def test_checkpoints_and_another_model_read_the_same_text(cli: Cli, trained: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for step in (5, 20):
        other_state(trained, checkpoints / f"step-{step:08d}", seed=step)
    other = other_state(trained, tmp_path / "other", seed=3)
    options = ("--max-tokens", "300", "--checkpoints", checkpoints, "--compare", other, "--report", tmp_path / "r.html")
    ended = cli("inspect", trained, *options, "--json")
    assert ended.code == 0, ended.err
    tables = json.loads(ended.out)["routing"]["tables"]
    assert [row[:2] for row in tables["saturation"]["rows"]] == [["5", 5], ["20", 20]]
    assert len(tables["compare-agreement"]["rows"]) == 2
    alone = cli("inspect", trained, "--checkpoints", trained, "--report", tmp_path / "r.html")
    assert "holds no earlier checkpoint" in alone.err


def test_a_trace_makes_the_same_page_without_its_model(cli: Cli, trained: Path, tmp_path: Path) -> None:
    network, folder = load(trained)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad(), moesaic.record(network, tmp_path / "a.trace", tokenizer=tokenizer) as trace:
        for prompt in PROMPTS:
            with trace.domain("prompt"):
                network(torch.tensor([tokenizer(prompt)["input_ids"]]))
    options = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    direct = cli("inspect", trained, *options, "--report", tmp_path / "a.html", "--json")
    ended = cli(
        "inspect", "--trace", tmp_path / "a.trace", "--tokenizer", folder, "--report", tmp_path / "b.html", "--json"
    )
    assert ended.code == 0, ended.err
    mine, theirs = (json.loads(found.out)["routing"]["tables"] for found in (ended, direct))
    assert mine["load"] == theirs["load"]
    assert texts_of(tmp_path / "a.html") == texts_of(tmp_path / "b.html")
    both = (
        "--trace",
        tmp_path / "a.trace",
        "--compare",
        tmp_path / "a.trace",
        "--report",
        tmp_path / "c.html",
        "--json",
    )
    agreement = json.loads(cli("inspect", trained, *both).out)["routing"]["tables"]["compare-agreement"]["rows"]
    assert [row[1] for row in agreement] == [1.0, 1.0]
    assert "is not read" in cli("inspect", trained, "--trace", tmp_path / "a.trace", "--prompt", "x").err


def test_figures_are_written_as_png_and_svg(
    cli: Cli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--prompt", PROMPTS[0], "--report", tmp_path / "r.html", "--figures", tmp_path / "figures")
    ended = cli("inspect", trained, *options, "--json")
    assert ended.code == 0, ended.err
    tables = json.loads(ended.out)["routing"]["tables"]
    names = {file.stem for file in (tmp_path / "figures").iterdir()}
    assert {"load", "deviation", "coactivation-layer-0"} <= names <= set(tables)
    for name in names:
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        words = ET.parse(tmp_path / "figures" / f"{name}.svg").getroot().itertext()
        assert any(word.strip() for word in words)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    missing = cli("inspect", trained, *options)
    assert missing.code == 2
    assert "moesaic[plots]" in missing.err


def test_a_model_of_transformers_is_read_as_it_is(cli: Cli, trained: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = step_of(trained)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "mixtral")
    tokenizer.save_pretrained(tmp_path / "mixtral")
    page = tmp_path / "r.html"
    ended = cli("inspect", tmp_path / "mixtral", "--prompt", PROMPTS[0], "--report", page, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(PROMPTS[0])["input_ids"]]), output_router_logits=True).router_logits
    for number, logits_TN in enumerate(logits):
        load = torch.bincount(logits_TN.topk(2).indices.flatten(), minlength=4)
        assert [row[2] for row in found["routing"]["tables"][f"load-layer-{number}"]["rows"]] == load.tolist()


def test_what_does_not_fit_is_named(cli: Cli, trained: Path, tmp_path: Path) -> None:
    folder = step_of(trained)
    network, _ = load(trained)
    spec = network.config.moe if isinstance(network.config.moe, dict) else network.config.moe.to_dict()
    spec = json.loads(json.dumps(spec, default=str))
    spec["experts"]["num_experts"] += 1
    wider = moesaic.build(network.config.backbone, spec)
    wider.save_pretrained(tmp_path / "wider")
    report = ("--prompt", "x", "--report", tmp_path / "r.html")
    ended = cli("inspect", trained, *report, "--checkpoints", tmp_path / "wider")
    assert ended.code == 2
    assert "give checkpoints of the same run" in ended.err
    renamed = other_state(trained, tmp_path / "renamed")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(renamed)
    ended = cli("inspect", trained, *report, "--compare", renamed)
    assert ended.code in (1, 2)
    assert "tokenizer" in ended.err
    with torch.no_grad(), moesaic.record(wider, tmp_path / "wider.trace"):
        wider(torch.tensor([[1, 2, 3]]))
    ended = cli("inspect", trained, "--trace", tmp_path / "wider.trace", "--report", tmp_path / "r.html")
    assert "the trace is of another model" in ended.err
    assert "give the folder of a model, or --trace" in cli("inspect").err
    assert "has no tokens" in cli("inspect", trained, "--prompt", "").err
    assert not (tmp_path / "r.html").exists()


def test_a_capacity_is_applied_to_the_picks_afterwards(cli: Cli, trained: Path, tmp_path: Path) -> None:
    options = ("--max-tokens", "300", "--capacity", "0.5", "--report", tmp_path / "r.html", "--json")
    tables = json.loads(cli("inspect", trained, *options).out)["routing"]["tables"]
    # Half of the even share has room for at most half of the picks.
    assert all(row[1] >= 0.45 for row in tables["drops-by-domain"]["rows"])
    assert "greater than 0" in cli("inspect", trained, *options[:2], "--capacity", "0", *options[4:]).err


def test_a_model_that_cannot_be_counted_is_still_read(
    cli: Cli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise UnsupportedModel("this family is not known")

    monkeypatch.setattr("moesaic.cli.inspect.account", refused)
    ended = cli("inspect", trained, "--prompt", PROMPTS[0], "--report", tmp_path / "r.html", "--json")
    assert ended.code == 0
    assert "Size and cost are left out: this family is not known" in ended.err
    assert "Size and cost" not in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert cli("inspect", trained).code == 2
