from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.papers.tiny import EXPERIMENT

from moesaic.papers import Reproduction, reproduce


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Models here are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    """The tiny experiment, run in one go with two seeds."""
    output = tmp_path_factory.mktemp("finished")
    return reproduce(EXPERIMENT, "cpu", output, seeds=(0, 1), jobs=1, progress=False)


@pytest.fixture(scope="session")
def data_folder(finished: Reproduction) -> Path:
    """Its tokenised text."""
    return finished.output / "data"
