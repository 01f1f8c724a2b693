"""Every mistake ends with exit code 2 and one message that names field, value and remedy; nothing is left behind."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import safetensors.torch
from tests.cli.conftest import Cli
from transformers import LlamaConfig, LlamaForCausalLM

from moesaic.train import CheckpointStore


def checkpoint(trained: Path, target: Path) -> Path:
    """A copy of the run's last checkpoint that a test may damage."""
    latest = CheckpointStore(trained / "checkpoints", keep=1).latest()
    assert latest is not None
    return Path(shutil.copytree(latest, target))


def says(error: str, *parts: str) -> None:
    """The whole of stderr is one message with these parts."""
    assert error.startswith("error: "), error
    assert error.count("error:") == 1
    assert "Traceback" not in error
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
        ("moe.layers.only=[7]", ("layers.only = 7 is not a layer", "choose 0 to 1")),
        ("backbone.model_type=nosuch", ("backbone.model_type = 'nosuch' is not a model type", "llama")),
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


def test_a_full_disk_while_saving(cli: Cli, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    model.save_pretrained(tmp_path / "dense")

    def full(self: object, folder: Path, **options: object) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    ended = cli("upcycle", tmp_path / "dense", tmp_path / "out", "--num-experts", "2", "--top-k", "1")
    assert ended.code == 2
    says(ended.err, "No space left on device")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


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


def test_an_unknown_task(cli: Cli, trained: Path) -> None:
    ended = cli("eval", trained, "--tasks", "no_such_task")
    assert ended.code == 2
    says(ended.err, "--tasks = 'no_such_task' is not a task")


def test_debug_shows_the_traceback(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic.errors import CheckpointError

    for arguments in (["--debug", "inspect", tmp_path], ["inspect", tmp_path, "--debug"]):
        with pytest.raises(CheckpointError):
            cli(*arguments)
