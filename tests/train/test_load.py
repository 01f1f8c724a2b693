from __future__ import annotations

import json

import pytest
import torch
from tests.train.builders import tiny_run

from moesaic.errors import CheckpointError
from moesaic.train import build_model, check_weight_files, load_model


@pytest.fixture
def sharded(data, tmp_path):
    build_model(tiny_run(data.config), data.tokenizer).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


def test_a_whole_model_loads_in_float32(sharded):
    check_weight_files(sharded)
    assert load_model(sharded).dtype == torch.float32


def test_a_tied_model_loads(data, tmp_path):
    model = build_model(tiny_run(data.config, moe=False, backbone={"tie_word_embeddings": True}), data.tokenizer)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_shard_is_named(sharded, size):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"{shard.name} is damaged: it has \d+ bytes"):
        load_model(sharded)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} is missing"):
        load_model(sharded)


def test_a_damaged_index_is_named(sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        load_model(sharded)


def test_weights_of_another_model_are_refused(sharded):
    config = json.loads((sharded / "config.json").read_text())
    config["backbone"]["num_hidden_layers"] = 3
    (sharded / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"do not fit its config\.json: \d+ missing tensors"):
        load_model(sharded)


def test_a_wider_model_is_refused(sharded):
    config = json.loads((sharded / "config.json").read_text())
    config["backbone"]["vocab_size"] = 999
    (sharded / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=str(sharded)):
        load_model(sharded)
