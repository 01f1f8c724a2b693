"""What each command does when all is well."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.conftest import RUN, Cli
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from moesaic.cli.app import app
from moesaic.train import CheckpointStore, evaluate, load_model
from moesaic.train.comparison import dense_control

COMMANDS = [command.name for command in app.registered_commands]


def test_every_command_of_the_design_is_there() -> None:
    assert COMMANDS == [
        "demo",
        "train",
        "generate",
        "eval",
        "convert",
        "upcycle",
        "export",
        "inspect",
        "trace",
        "plan",
        "reproduce",
        "bench",
    ]


def test_commands_of_the_catalogue_are_a_group() -> None:
    assert [group.name for group in app.registered_groups] == ["catalog"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(cli: Cli, command: str) -> None:
    ended = cli(command, "--help")
    assert ended.code == 0
    text = " ".join(re.sub(r"[│╭╰─╮╯]", " ", ended.out).split())
    assert f"Example: moesaic {command} " in text
    assert "--json" in text


def test_train_resumes_where_it_was(cli: Cli, run_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    first = cli("train", run_file, "-o", output, "--set", "train.steps=1", "--json")
    assert (first.code, json.loads(first.out)["step"]) == (0, 1)
    again = json.loads(cli("train", run_file, "-o", output, "--resume", "--json").out)
    assert (again["step"], again["finished"], again["tokens"]) == (3, True, 3 * 4 * 32)
    assert set(again["validation"]) == {"prose", "code"}
    assert Path(again["checkpoint"]).is_dir()
    refused = cli("train", run_file, "-o", output, "--no-resume")
    assert refused.code == 2
    assert "--no-resume" in refused.err or "checkpoint" in refused.err


def test_generate_streams_and_repeats(cli: Cli, trained: Path) -> None:
    first = cli("generate", trained, "-p", "The", "--max-new-tokens", "8", "--seed", "3")
    assert first.code == 0
    assert first.out
    assert "tokens/s" in first.err
    assert cli("generate", trained, "-p", "The", "--max-new-tokens", "8", "--seed", "3").out == first.out
    assert cli("generate", trained, "-p", "The", "--max-new-tokens", "8", "--seed", "4").out != first.out


def test_generate_from_stdin_and_from_nothing(cli: Cli, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--max-new-tokens", "4", "--temperature", "0", "--json")
    monkeypatch.setattr(sys, "stdin", io.StringIO("import os"))
    piped = json.loads(cli("generate", trained, "-p", "-", *options).out)
    given = json.loads(cli("generate", trained, "-p", "import os", *options).out)
    assert piped["text"] == given["text"]
    assert piped["tokens"] <= 4
    assert cli("generate", trained, "-p", "", *options).code == 0


def test_generate_with_beams_equals_transformers(cli: Cli, trained: Path) -> None:
    options = ("--max-new-tokens", "4", "--temperature", "0", "--num-beams", "3", "--json")
    text = json.loads(cli("generate", trained, "-p", "def", *options).out)["text"]
    from moesaic.cli.models import load, tokenizer_of

    model, folder = load(trained)
    tokenizer = tokenizer_of(folder, model)
    inputs = tokenizer("def", return_tensors="pt")
    beams = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=4,
        num_beams=3,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    assert text == tokenizer.decode(beams[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_eval_measures_what_the_run_held_out(cli: Cli, trained: Path) -> None:
    from moesaic.data import prepare_data
    from moesaic.train import RunConfig

    report = json.loads(cli("eval", trained, "--json").out)
    data = prepare_data(RunConfig.from_dict(RUN).data, trained / "data", progress=False)
    latest = CheckpointStore(trained / "checkpoints", keep=1).latest()
    assert latest is not None
    expected = evaluate(load_model(latest), data.validation_batches(batch_size=8))
    assert set(report["domains"]) == {"prose", "code"}
    for domain, found in expected.items():
        assert report["domains"][domain]["loss"] == pytest.approx(found.loss, abs=1e-5)
    total = sum(found["tokens"] for found in report["domains"].values())
    assert report["overall"]["tokens"] == total


def test_eval_of_given_text_counts_every_token(cli: Cli, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three four five", encoding="utf-8")
    (tmp_path / "b.txt").write_text("def f(): pass", encoding="utf-8")
    texts = ["--text", tmp_path / "a.txt", "--text", f"code={tmp_path / 'b.txt'}"]
    report = json.loads(cli("eval", trained, *texts, "--sequence-length", "16", "--json").out)
    assert set(report["domains"]) == {"a", "code"}
    assert all(found["tokens"] > 0 for found in report["domains"].values())
    table = cli("eval", trained, *texts).out
    assert "perplexity" in table


def test_inspect_counts_a_run_before_it_is_trained(cli: Cli, run_file: Path, trained: Path) -> None:
    planned = json.loads(cli("inspect", run_file, "--json").out)
    made = json.loads(cli("inspect", trained, "--json").out)
    assert planned == made
    fewer = json.loads(cli("inspect", run_file, "--set", "moe.router.top_k=1", "--json").out)
    assert fewer["parameters"]["active"] < planned["parameters"]["active"]
    dense = json.loads(cli("inspect", run_file, "--set", "moe=null", "--json").out)
    assert dense["parameters"]["active"] == dense["parameters"]["total"]
    assert made["parameters"]["active"] < made["parameters"]["total"]
    printed = cli("inspect", trained).out
    assert "routed experts" in printed


def test_inspect_draws_the_routing(cli: Cli, trained: Path, tmp_path: Path) -> None:
    report = tmp_path / "routing.html"
    ended = cli("inspect", trained, "--report", report, "--max-tokens", "200", "--json")
    routing = json.loads(ended.out)["routing"]
    page = report.read_text(encoding="utf-8")
    assert routing["report"] == str(report)
    assert routing["tokens"] >= 200
    assert set(routing["max_violation"]) == {"0", "1"}
    assert page.lower().startswith("<!doctype html>")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


def test_convert_and_export_give_the_same_files(cli: Cli, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    assert cli("convert", tmp_path / "mixtral", tmp_path / "ours").code == 0
    back = cli("export", tmp_path / "ours", tmp_path / "back", "--json")
    assert json.loads(back.out)["architecture"] == "MixtralForCausalLM"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("mixtral", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_upcycle_keeps_the_logits(cli: Cli, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()
    dense.save_pretrained(tmp_path / "dense")
    options = ("--num-experts", "4", "--top-k", "2", "--set", "moe.layers.only=[1]")
    assert cli("upcycle", tmp_path / "dense", tmp_path / "moe", *options).code == 0
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    assert list(sparse.moe_blocks()) == [1]
    input_ids = torch.arange(12).view(1, 12)
    torch.testing.assert_close(sparse(input_ids).logits, dense(input_ids).logits)
    inexact = cli("upcycle", tmp_path / "dense", tmp_path / "noisy", "--noise", "0.1", "--json")
    assert inexact.code == 0
    noisy = AutoModelForCausalLM.from_pretrained(tmp_path / "noisy").eval()
    assert not torch.allclose(noisy(input_ids).logits, dense(input_ids).logits)


def test_the_dense_control_is_as_wide_as_what_a_token_uses() -> None:
    from moesaic.cli.demo import demo_run

    run = demo_run()
    control = dense_control(run)
    assert isinstance(run.backbone, dict)
    assert isinstance(control.backbone, dict)
    assert control.moe is None
    assert control.backbone == run.backbone  # layers that stay dense in the MoE are as wide as its active experts
    assert control.data == run.data


def test_demo_trains_once_and_starts_anew_on_request(cli: Cli, tmp_path: Path) -> None:
    small = [
        *("--set", "train.steps=2", "--set", "train.eval_batches=1", "--set", "data.sources.0.max_bytes=150000"),
        *("--set", "backbone.hidden_size=48", "--set", "data.tokenizer.vocab_size=400"),
        *("--set", "moe.experts.num_experts=16", "--set", "data.sequence_length=32"),
        *("--set", "data.validation_fraction=0.3"),
    ]
    output = tmp_path / "demo"
    first = cli("demo", "-o", output, *small)
    assert first.code == 0, first.err
    for part in ("validation loss", "tokens/s", "active for a token", "checkpoint", "routing.html", "Try next"):
        assert part in first.out
    assert (output / "routing.html").is_file()
    metrics = (output / "moe" / "metrics.jsonl").read_text()
    again = json.loads(cli("demo", "-o", output, *small, "--json").out)
    assert again["moe"]["finished"]
    assert (output / "moe" / "metrics.jsonl").read_text() == metrics
    assert again["sample"]

    other = [*small, "--set", "train.learning_rate=0.01"]
    assert cli("demo", "-o", output, *other).code == 2  # another run: not mixed with the first
    assert cli("demo", "-o", output, *other, "--restart").code == 0
    assert (output / "moe" / "metrics.jsonl").read_text() != metrics


def test_demo_does_not_delete_what_is_not_a_run(cli: Cli, tmp_path: Path) -> None:
    precious = tmp_path / "demo" / "moe" / "thesis.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work", encoding="utf-8")
    ended = cli("demo", "-o", tmp_path / "demo", "--restart")
    assert ended.code == 2
    assert "holds something else than a run" in ended.err
    assert precious.read_text(encoding="utf-8") == "years of work"


def test_a_model_by_task_is_trained_on_domains_and_continues_text_of_one(
    cli: Cli, run_file: Path, tmp_path: Path
) -> None:
    options = ("--set", "moe.router={type: task, num_tasks: 2, top_k: 2}", "--set", "data.domains_are=task")
    folder = tmp_path / "out"
    assert cli("train", run_file, "-o", folder, *options, "--json").code == 0
    evaluated = cli("eval", folder, "--limit", "1", "--json")
    assert json.loads(evaluated.out)["domains"].keys() == {"prose", "code"}
    assert cli("inspect", folder, "--report", tmp_path / "routing.html", "--max-tokens", "50").code == 0
    generate = ("generate", folder, "-p", "The", "--max-new-tokens", "2")
    assert cli(*generate, "--domain", "1").code == 0
    missing = cli(*generate)
    assert missing.code == 2
    assert "--domain = None is missing: the router of this model looks at the task" in missing.err
    beyond = cli(*generate, "--domain", "2")
    assert beyond.code == 2
    assert "task = 2 is not in [0, 2)" in beyond.err


def test_a_domain_means_nothing_to_other_models(cli: Cli, trained: Path) -> None:
    ended = cli("generate", trained, "-p", "The", "--domain", "1")
    assert ended.code == 2
    assert "--domain = 1 means nothing to this model; leave it out" in ended.err


def test_upcycling_into_another_router(cli: Cli, tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)).save_pretrained(tmp_path / "dense")
    options = ("--num-experts", "4", "--top-k", "2", "--set", "moe.router.type=recurrent", "--set")
    ended = cli("upcycle", tmp_path / "dense", tmp_path / "out", *options, "moe.router.state_size=8", "--inexact")
    assert ended.code == 0, ended.err
    router = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.spec.router
    assert (router.type, router.top_k, router.state_size) == ("recurrent", 2, 8)


def test_overridden_routing(cli: Cli, trained: Path, tmp_path: Path) -> None:
    options = ("-p", "The", "--max-new-tokens", "4", "--temperature", "0", "--json")
    plain = json.loads(cli("generate", trained, *options).out)["text"]
    assert json.loads(cli("generate", trained, *options, "--override", "k=2").out)["text"] == plain
    losses = []
    (tmp_path / "weak.yaml").write_text("parts: [{type: rank, rank: [8]}]")
    for override in ((), ("--override", "rank=8"), ("--override", tmp_path / "weak.yaml"), ("--override", "k=2")):
        report = json.loads(cli("eval", trained, "--limit", "1", "--json", *override).out)
        assert ("override" in report) == bool(override)
        losses.append(report["overall"]["loss"])
    assert losses[0] == losses[3] != losses[1] == losses[2]
    refused = cli("generate", trained, "-p", "The", "--override", "rank=9")
    assert refused.code == 2
    assert "rank = 9 is more than the 8 experts" in " ".join(refused.err.split())
    assert cli("eval", trained, "--override", "beta=2").code == 2
