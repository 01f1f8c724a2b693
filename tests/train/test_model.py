from __future__ import annotations

import pytest
import torch
from tests.train.builders import data_config, tiny_run

from moesaic.data import prepare_data
from moesaic.errors import CheckpointError, ConfigError
from moesaic.hf import MoesaicForCausalLM
from moesaic.trace import record
from moesaic.train import RunConfig, build_model, train
from moesaic.train.evaluate import evaluate
from moesaic.train.load import load_model
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


TASK = {"type": "task", "num_tasks": 2, "kind": "fixed"}  # 4 experts: 0, 1 for the first domain, 2, 3 for the second
BANKS = {"type": "modality", "banks": [2, 2], "top_k": 1}


@pytest.mark.parametrize(("kind", "router"), [("task", TASK), ("modality", BANKS)])
def test_domains_are_the_tasks_or_modalities_of_a_run(corpus, tmp_path, kind, router):
    config = data_config(corpus, domains_are=kind)
    data = prepare_data(config, tmp_path / "data", progress=False)
    result = train(tiny_run(config, moe={"router": router}, steps=2), tmp_path / "run", data=data, progress=False)
    assert result.finished
    assert set(result.validation) == {"sea", "land"}
    model = load_model(result.checkpoint)
    for place, domain in enumerate(("sea", "land")):  # in the order in which they are read
        with record(model, keep="counts") as trace:
            evaluate(model, {domain: data.validation_batches()[domain]})
        for layer in trace.layers.values():
            assert layer.load_N[2 * place : 2 * place + 2].sum() == layer.load_N.sum() > 0


def test_a_dense_model_is_trained_on_the_same_batches_and_told_nothing(corpus, tmp_path):
    config = data_config(corpus, domains_are="task")
    assert train(tiny_run(config, moe=False, steps=1), tmp_path / "run", progress=False).finished


def test_a_saved_model_that_looks_at_tasks_is_refused_without_them(data, tmp_path):
    run = tiny_run(data_config(tmp_path, domains_are="task"), moe={"router": TASK})
    build_model(run, data.tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^data\.domains_are = None gives the model no task, at which router task"):
        build_model(RunConfig(initial_model=str(tmp_path)), data.tokenizer)
