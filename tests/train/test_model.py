from __future__ import annotations

import pytest
import torch
from tests.train.builders import tiny_run

from moesaic.errors import CheckpointError, ConfigError
from moesaic.hf import MoesaicForCausalLM
from moesaic.train import RunConfig, build_model
from moesaic.train.model import select_device
from moesaic.train.rng import seed_all


def test_moe_or_dense_by_the_moe_section(data):
    assert isinstance(build_model(tiny_run(data.config), data.tokenizer), MoesaicForCausalLM)
    dense = build_model(tiny_run(data.config, moe=False), data.tokenizer)
    assert type(dense).__name__ == "LlamaForCausalLM"


def test_vocabulary_and_special_tokens_come_from_the_tokenizer(data):
    config = build_model(tiny_run(data.config, moe=False), data.tokenizer).config
    assert config.vocab_size == len(data.tokenizer)
    assert config.eos_token_id == data.tokenizer.eos_token_id


def test_a_vocabulary_that_is_too_small_is_refused(data):
    with pytest.raises(ConfigError, match=r"backbone\.vocab_size = 10 is smaller than the tokenizer's"):
        build_model(tiny_run(data.config, backbone={"vocab_size": 10}), data.tokenizer)


def test_the_same_seed_gives_the_same_weights(data):
    run, models = tiny_run(data.config), []
    for _ in range(2):
        seed_all(3)
        models.append(build_model(run, data.tokenizer).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_training_starts_from_a_saved_model(data, tmp_path):
    saved = build_model(tiny_run(data.config), data.tokenizer)
    saved.save_pretrained(tmp_path)
    loaded = build_model(RunConfig(initial_model=str(tmp_path)), data.tokenizer)
    assert isinstance(loaded, MoesaicForCausalLM)
    expected = saved.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_a_missing_initial_model_is_named(data, tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        build_model(RunConfig(initial_model=str(tmp_path)), data.tokenizer)


@pytest.mark.parametrize("name", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match=rf"train\.device = '{name}'"):
        select_device(name)
