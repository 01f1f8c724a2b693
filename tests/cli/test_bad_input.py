"""Every mistake ends with exit code 2 and one message that names field, value and remedy; nothing is left behind."""

from __future__ import annotations

import contextlib
import errno
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
from tests.cli.conftest import Cli
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from moesaic.train import CheckpointStore


def checkpoint(trained: Path, target: Path) -> Path:
    """A copy of the run's last checkpoint that a test may damage."""
    latest = CheckpointStore(trained / "checkpoints", keep=1).latest()
    assert latest is not None
    return Path(shutil.copytree(latest, target))


def says(error: str, *parts: str) -> None:
    """The whole of stderr is one message with these parts."""
    assert error.startswith("error: "), error
    assert error.strip().count("\n") == 0, error
    for part in parts:
        assert part in error, error


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("moe.router.topk=2", ("moe.router.topk = 2 is not a known key", "did you mean 'top_k'")),
        ("trian.steps=2", ("trian = {'steps': 2} is not a known key", "did you mean 'train'")),
        ("moe.router.top_k=9", ("moe.router.top_k = 9 is larger than num_experts (8)", "choose 1 to 8")),
        ("moe.router.num_groups=3", ("top_k_groups = None is missing", "set both or neither")),
        ("moe.router.type=oracle", ("moe.router.type = 'oracle' is not one of the choices", "'top_k'")),
        ("train.steps=none", ("train.steps = 'none' is not valid", "integer")),
        ("moe.layers.only=[7]", ("moe.layers.only = 7 is not a layer", "choose 0 to 1")),
        ("moe.layers.top_k=[1]", ("moe.layers.top_k = (1,) has 1 values for 2 MoE layers", "the layers [0, 1]")),
        ("moe.router=top_k", ("moe.router = 'top_k' is not valid", "`key: value` pairs", "`type`")),
        ("moe.capacity=1.25", ("moe.capacity = 1.25 is not valid", "`key: value` pairs")),
        ("moe.balance.0.coefficient={start: 1}", ("moe.balance.0.coefficient.end = None is required",)),
        (
            "moe.router={type: task, num_tasks: 2, top_k: 2}",
            ("data.domains_are = None", "router task", "set it to task"),
        ),
        (
            "moe.router={type: hash, vocabulary_size: 400, table: balanced, frequencies: counts.json}",
            ("moe.router.frequencies = '", "counts.json' can't be read", "JSON"),
        ),
        ("backbone.model_type=nosuch", ("backbone.model_type = 'nosuch' is not a model type", "llama")),
        ("backbone.hiden_size=48", ("backbone.hiden_size = 48 is not a key of llama", "did you mean 'hidden_size'?")),
        ("backbone.num_attention_heads=5", ("backbone = {", "llama says", "not a multiple", "attention heads (5)")),
        ("backbone.hidden_size=wide", ("backbone = {", "llama says", "'hidden_size' expected int", "'wide'")),
        ("backbone=./nowhere", ("backbone = './nowhere' does not exist", "config.json")),
        ("train.seed=99999999999999999999", ("train.seed", "less than")),
        ("backbone={model_type: opt}", ("backbone.model_type = 'opt' can't be a backbone", "use one of")),
        ("data.sources.0.type=web", ("data.sources.0.type = 'web' is not one of the choices",)),
        ("train.device=abacus", ("train.device = 'abacus' is not a device", "use auto")),
        ("steps", ("--set = 'steps' has no `=`", "write it as a.b=value")),
        ("data.sequence_length=100000000", ("data.sequence_length = 100000000 is longer than the training text",)),
    ],
)
def test_a_field_that_cannot_be_used(
    cli: Cli, run_file: Path, tmp_path: Path, override: str, parts: tuple[str, ...]
) -> None:
    ended = cli("train", run_file, "-o", tmp_path / "out", "--set", override)
    assert ended.code == 2
    assert ended.out == ""
    says(ended.err.strip(), *parts)
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize(
    "override",
    [
        "backbone.model_type=nosuch",
        "backbone={model_type: opt}",
        "moe.layers.only=[7]",
        "moe.router={type: task, num_tasks: 2, top_k: 2}",
        "moe.router={type: modality, banks: [4, 4], top_k: 2}",
        "moe.balance.0={type: local_entropy, modality: 1, coefficient: 0.1}",
        "moe.router={type: hash, vocabulary_size: 400, table: balanced, frequencies: counts.json}",
        "moe.router={type: hash, vocabulary_size: 100}",
        "train.device=abacus",
    ],
)
def test_a_model_that_cannot_be_built_is_refused_before_text_is_read(
    cli: Cli, run_file: Path, tmp_path: Path, override: str
) -> None:
    assert cli("train", run_file, "-o", tmp_path / "out", "--set", override).code == 2
    assert not (tmp_path / "out").exists()


def test_experts_that_groups_do_not_divide(cli: Cli, run_file: Path, tmp_path: Path) -> None:
    sets = ["--set", "moe.router.num_groups=3", "--set", "moe.router.top_k_groups=1"]
    ended = cli("train", run_file, "-o", tmp_path / "out", *sets)
    assert ended.code == 2
    says(ended.err, "moe.router.num_groups = 3 does not divide num_experts (8)", "choose from [1, 2, 4, 8]")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("{type: text, paths: [nowhere.txt]}", ("nowhere.txt", "give a file")),
        ("{type: text, paths: [empty.txt]}", ("the corpus is empty", "data.sources")),
        ("{type: jsonl, paths: [bad.jsonl]}", ("bad.jsonl:2", "text_field")),
        ("{type: text, paths: [latin.txt]}", ("latin.txt", "UTF-8")),
    ],
)
def test_text_that_cannot_be_read(
    cli: Cli, run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, parts: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("bad.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n', encoding="utf-8")
    Path("latin.txt").write_bytes("déjà".encode("latin-1"))
    ended = cli("train", run_file, "-o", "out", "--set", f"data.sources=[{source}]")
    assert ended.code == 2
    says(ended.err.strip(), *parts)


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_a_missing_configuration(cli: Cli, tmp_path: Path, command: str) -> None:
    ended = cli(command, tmp_path / "no.yaml", *(["-o", tmp_path / "out"] if command == "train" else []))
    assert ended.code == 2
    says(ended.err, "no.yaml", "is not a file", "give the path of a YAML file")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"moe: [1\nb: 2\n", ("is not valid YAML (line 2, column 2:", "correct that line")),
        (b"- moe\n", ("does not hold a mapping", "`key: value`")),
        (b"", ("does not hold a mapping",)),
        (b"\xff\xfe\x00", ("is not valid YAML", "give a UTF-8 text file")),
    ],
)
def test_a_configuration_that_is_none(cli: Cli, tmp_path: Path, content: bytes, parts: tuple[str, ...]) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    ended = cli("train", tmp_path / "bad.yaml", "-o", tmp_path / "out")
    assert ended.code == 2
    says(ended.err, "bad.yaml", *parts)
    assert cli("train", tmp_path, "-o", tmp_path / "out").code == 2  # a folder
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model(cli: Cli, trained: Path, tmp_path: Path) -> None:
    ended = cli("generate", trained, "-p", "x", "--tokenizer", tmp_path / "none")
    assert ended.code == 2
    says(ended.err, "--tokenizer = ", "is not a folder")

    folder = checkpoint(trained, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(tmp_path / "larger")
    ended = cli("eval", folder, "--tokenizer", tmp_path / "larger")
    assert ended.code == 2
    says(ended.err, "larger has 401 tokens and the model only 400")

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    ended = cli("generate", folder, "-p", "x")
    assert ended.code == 2
    says(ended.err, "there is no tokenizer in", "--tokenizer")


def test_more_tokens_than_positions(cli: Cli, trained: Path) -> None:
    ended = cli("generate", trained, "-p", "x", "--max-new-tokens", "3000")
    assert ended.code == 2
    says(ended.err, "--max-new-tokens = 3000 after 1 tokens of prompt", "2048 positions", "at most 2047")
    ended = cli("eval", trained, "--sequence-length", "4096")
    assert ended.code == 2
    says(ended.err, "--sequence-length = 4096", "choose 2 to 2048")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("{broken", "not a valid JSON file"),
        ("{}", "model_type"),
        ('{"model_type": "zork"}', "zork"),
        ('{"model_type": "moesaic"}', "moe.experts = None is required"),
    ],
)
def test_a_model_without_a_usable_config(cli: Cli, trained: Path, tmp_path: Path, config: str, reason: str) -> None:
    folder = checkpoint(trained, tmp_path / "model")
    (folder / "config.json").write_text(config, encoding="utf-8")
    ended = cli("inspect", folder)
    assert ended.code == 2
    says(ended.err, "cannot load the model", "model", reason)
    assert len(ended.err) < 500


def test_a_model_that_the_command_is_not_for(cli: Cli, trained: Path, tmp_path: Path) -> None:
    dense = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(dense).save_pretrained(tmp_path / "dense")
    OPTForCausalLM(
        OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "opt")
    (tmp_path / "no-moe.yaml").write_text("train: {steps: 1}\n", encoding="utf-8")
    out = tmp_path / "out"
    for arguments, parts in (
        (["convert", trained, out], ("is a moesaic model already",)),
        (["convert", tmp_path / "dense", out], ("model_type = 'llama' is not an MoE family", "mixtral")),
        (["export", tmp_path / "dense", out], ("is a LlamaForCausalLM, not a moesaic model",)),
        (["upcycle", trained, out], ("has MoE layers already",)),
        (["upcycle", tmp_path / "opt", out], ("backbone.model_type = 'opt' can't be a backbone", "use one of")),
        (["upcycle", tmp_path / "dense", out, "--top-k", 9], ("moe.router.top_k = 9 is larger than num_experts (8)",)),
        (["upcycle", tmp_path / "dense", out, "--config", tmp_path / "no-moe.yaml"], ("moe = None is not a section",)),
        (["inspect", trained, "--set", "moe.router.top_k=1"], ("--set", "changes nothing in a saved model")),
        (["inspect", trained, "--report", tmp_path], ("--report", "is a folder")),
        (["eval", tmp_path / "dense"], ("there is no tokenizer in", "--tokenizer")),
        (["eval", trained, "--text", "code="], ("--text = 'code=' lacks its domain or its path",)),
        (["eval", trained, "--tasks", "x", "--tasks-folder", out], ("--tasks-folder", "is not a folder")),
    ):
        ended = cli(*arguments)
        assert (ended.code, ended.out) == (2, ""), arguments
        says(ended.err, *parts)
    assert not out.exists()


def test_a_missing_model(cli: Cli, tmp_path: Path) -> None:
    for arguments in (["generate", tmp_path / "none", "-p", "x"], ["eval", tmp_path / "none"], ["inspect", tmp_path]):
        ended = cli(*arguments)
        assert ended.code == 2
        says(ended.err, "model = ", "give the folder of a model or of a training run")


def test_a_truncated_shard(cli: Cli, trained: Path, tmp_path: Path) -> None:
    folder = checkpoint(trained, tmp_path / "cut")
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    for arguments in (["generate", folder, "-p", "x"], ["export", folder, tmp_path / "out"]):
        ended = cli(*arguments)
        assert ended.code == 2
        says(ended.err, "model.safetensors is damaged", "copy the checkpoint again")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "other"), [('"num_experts": 8', '"num_experts": 4'), ('"hidden_size": 32', '"hidden_size": 16')]
)
def test_weights_of_another_model(cli: Cli, trained: Path, tmp_path: Path, field: str, other: str) -> None:
    folder = checkpoint(trained, tmp_path / "mixed")
    config = folder / "config.json"
    assert field in config.read_text()
    config.write_text(config.read_text().replace(field, other))
    for arguments in (["inspect", folder], ["export", folder, tmp_path / "out"]):
        ended = cli(*arguments)
        assert ended.code == 2
        says(ended.err, "mixed", "do not fit its config.json", "different models", "instead of")
    assert not (tmp_path / "out").exists()


def test_a_missing_expert(cli: Cli, trained: Path, tmp_path: Path) -> None:
    folder = checkpoint(trained, tmp_path / "incomplete")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".experts.7.down_proj" not in name}
    safetensors.torch.save_file(kept, folder / "model.safetensors", {"format": "pt"})
    ended = cli("inspect", folder)
    assert ended.code == 2
    says(ended.err, "incomplete", "experts.down_proj with shape (7, 32, 16) instead of (8, 32, 16)")


def test_a_run_folder_of_another_run(cli: Cli, run_file: Path, trained: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(trained, tmp_path / "run"))
    ended = cli("train", run_file, "-o", output, "--set", "train.learning_rate=0.5")
    assert ended.code == 2
    says(ended.err, "belongs to another run: train.learning_rate is 0.001 there and 0.5 here")


@contextlib.contextmanager
def full_disk(largest_file: int) -> Iterator[None]:
    """Writes fail as on a full disk: no file of this process may grow beyond some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_saving(cli: Cli, tmp_path: Path) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    model.save_pretrained(tmp_path / "dense")
    with full_disk(10_000):  # config.json fits, the weights don't
        ended = cli("upcycle", tmp_path / "dense", tmp_path / "out", "--num-experts", "2", "--top-k", "1")
    assert ended.code == 2
    says(ended.err, "cannot write the model", "out", "nothing was left there", "Free some space")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_full_disk_while_training(cli: Cli, run_file: Path, trained: Path, tmp_path: Path) -> None:
    with full_disk(20_000):
        ended = cli("train", run_file, "-o", tmp_path / "out", "--cache", trained / "data", "--json")
    assert ended.code == 2
    says(ended.err, "cannot write the checkpoint", "there is no earlier checkpoint", "Free some space")
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space, then run the same command again"),
        (errno.EACCES, "check the path and its permissions"),
    ],
)
def test_what_the_file_system_says_comes_with_a_remedy(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, "the reason", "the/file")

    monkeypatch.setattr("moesaic.cli.inspect.load", refused)
    ended = cli("inspect", tmp_path)
    assert (ended.code, ended.err) == (2, f"error: the/file: the reason; {remedy}\n")


def test_what_nobody_foresaw_is_one_message_too(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.cli.inspect.load", lambda path: [][0])
    ended = cli("inspect", tmp_path)
    assert ended.code == 1
    says(ended.err, "unexpected IndexError: list index out of range", "--debug")


def test_an_output_that_exists(cli: Cli, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ended = cli("export", trained, tmp_path / "out")
    assert ended.code == 2
    says(ended.err, "out' exists", "--overwrite")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_that_no_family_can_say(cli: Cli, trained: Path, tmp_path: Path) -> None:
    folder = checkpoint(trained, tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 1.0', '"scaling_factor": 2.0'))
    ended = cli("export", folder, tmp_path / "out")
    assert ended.code == 2
    says(ended.err, "moe.router.scaling_factor = 2.0")
    assert not (tmp_path / "out").exists()


def test_wrong_usage(cli: Cli, trained: Path) -> None:
    assert cli("generate", trained).code == 2
    assert cli("train").code == 2
    assert cli("nonsense").code == 2
    assert cli("eval", trained, "--batch-size", "0").code == 2
    assert cli("generate", trained, "-p", "x", "--seed", str(2**70)).code == 2
    wrong_size = cli("export", trained, "out", "--max-shard-size", "many")
    assert wrong_size.code == 2
    assert "'many' is not a size" in wrong_size.err


def test_an_unknown_task(cli: Cli, trained: Path) -> None:
    ended = cli("eval", trained, "--tasks", "no_such_task")
    assert ended.code == 2
    says(ended.err, "--tasks = 'no_such_task' is not a task")


def test_debug_shows_the_traceback(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic.errors import CheckpointError

    for arguments in (["--debug", "inspect", tmp_path], ["inspect", tmp_path, "--debug"]):
        with pytest.raises(CheckpointError):
            cli(*arguments)


def test_a_process_ends_with_the_code_and_one_line(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "moesaic"), "convert", str(tmp_path), str(tmp_path / "out"), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    says(ended.stderr, "model = ", "has no config.json and no checkpoints", "give the folder of a model")
