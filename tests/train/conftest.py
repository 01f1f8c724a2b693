from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.train.builders import data_config, write_corpus

from moesaic.data import PreparedData, prepare_data
from moesaic.train import CheckpointStore, RunConfig, Trainer, build_model
from moesaic.train.model import prepare_for_training, select_device
from moesaic.train.rng import seed_all


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Models here are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def data(corpus: Path) -> PreparedData:
    return prepare_data(data_config(corpus), corpus / "cache", progress=False)


@pytest.fixture
def make_trainer(data: PreparedData, tmp_path: Path):
    """Build the trainer of a run at step 0."""

    def make(run: RunConfig, data: PreparedData = data) -> Trainer:
        seed_all(run.train.seed)
        model = build_model(run, data.tokenizer)
        prepare_for_training(model, run.train, select_device(run.train.device))
        return Trainer(run, model, data, CheckpointStore(tmp_path / "checkpoints", 2))

    return make
