"""One tiny model for each core family; tests that change it take `copy_of(model)`."""

from __future__ import annotations

import pytest
import torch
from tests.hf.tiny import CORE_FAMILIES, tiny_model

from moesaic import MoesaicForCausalLM


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Work of this size is slower on many threads, above all when tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=CORE_FAMILIES)
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def model(model_type: str) -> MoesaicForCausalLM:
    return tiny_model(model_type)


@pytest.fixture(scope="session")
def llama() -> MoesaicForCausalLM:
    return tiny_model("llama")
