from __future__ import annotations

import pytest
from tests.train.builders import BACKBONE

from moesaic.errors import ConfigError
from moesaic.train import RunConfig

YAML = """
backbone: {model_type: llama, hidden_size: 32}
data:
  sources:
    - {type: text, paths: [texts, /absolute/file.txt]}
    - {type: datasets, path: json, data_files: {train: rows.jsonl, other: "hf://datasets/x/y.json"}}
  tokenizer: {type: pretrained, path: ./tokenizer}
train: {steps: 10}
"""


def test_paths_are_taken_from_the_folder_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path.parent)
    run = RunConfig.from_yaml(f"{tmp_path.name}/run.yaml")
    texts, rows = run.data.sources
    assert texts.paths == (str(tmp_path / "texts"), "/absolute/file.txt")
    assert rows.path == "json"
    assert rows.data_files == {"train": str(tmp_path / "rows.jsonl"), "other": "hf://datasets/x/y.json"}
    assert run.data.tokenizer.path == str(tmp_path / "tokenizer")


def test_counts_of_a_router_lie_beside_the_file(tmp_path):
    text = "backbone: {model_type: llama}\nmoe:\n  experts: {num_experts: 4, intermediate_size: 8}\n  router: "
    for frequencies, expected in (("counts.json", str(tmp_path / "counts.json")), ("zipf", "zipf")):
        router = f"{{type: hash, vocabulary_size: 300, table: balanced, frequencies: {frequencies}}}"
        (tmp_path / "run.yaml").write_text(text + router)
        run = RunConfig.from_yaml(tmp_path / "run.yaml")
        assert run.moe.router.frequencies == expected


def test_a_name_that_exists_beside_the_file_is_a_path_and_another_is_a_hub_name(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "local.yaml").write_text("initial_model: model")
    (tmp_path / "hub.yaml").write_text("initial_model: org/model")
    assert RunConfig.from_yaml(tmp_path / "local.yaml").initial_model == str(tmp_path / "model")
    assert RunConfig.from_yaml(tmp_path / "hub.yaml").initial_model == "org/model"


def test_overrides_win_and_their_paths_stay(tmp_path):
    (tmp_path / "run.yaml").write_text(YAML)
    run = RunConfig.from_yaml(
        tmp_path / "run.yaml", ["train.steps=3", "data.sources=[{type: text, paths: [here.txt]}]"]
    )
    assert run.train.steps == 3
    assert run.data.sources[0].paths == ("here.txt",)


def test_the_resolved_run_round_trips():
    run = RunConfig.from_dict({"backbone": BACKBONE, "train": {"schedule": {"type": "wsd"}}})
    assert RunConfig.from_dict(run.to_dict()) == run


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"backbone = None is required"),
        ({"backbone": BACKBONE, "initial_model": "m"}, r"initial_model = 'm' already says what backbone is"),
        ({"backbone": BACKBONE, "train": {"step": 3}}, r"train\.step = 3 is not a known key; did you mean 'steps'"),
        ({"backbone": BACKBONE, "train": {"betas": [0.9, 1.0]}}, r"train\.betas\.1 = 1.0 is not an averaging factor"),
        ({"backbone": BACKBONE, "train": {"schedule": {"type": "step"}}}, r"train\.schedule\.type = 'step'"),
        ({"backbone": BACKBONE, "data": 3}, r"data = 3 is not valid"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(values)
