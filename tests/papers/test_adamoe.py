from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moesaic
from moesaic.hf import MoesaicForCausalLM
from moesaic.papers import EXPERIMENTS, Forking, arms_of
from moesaic.papers.adamoe import as_it_is, random_skip, with_nulls
from moesaic.train import load_model

INPUT_IDS = torch.arange(40).view(2, 20)
BACKBONE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
}
MOE = {
    "experts": {"num_experts": 8, "intermediate_size": 16},
    "router": {"top_k": 2, "normalize_top_k": True},
    "balance": [{"type": "load_balancing", "coefficient": 0.01}],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    moesaic.build(BACKBONE, MOE).save_pretrained(folder)
    return folder


def forked(checkpoint: Path, folder: Path, arm: str, measured: Any = None) -> MoesaicForCausalLM:
    """The initial model of an arm of the experiment, made as its size says."""
    experiment = EXPERIMENTS["adamoe"]
    options = arms_of(experiment, "gpu")[arm].fork
    fork = experiment.arms[arm].fork
    assert fork is not None
    fork(Forking(checkpoint, folder / arm, options, measured or {}))
    model = load_model(folder / arm)
    assert isinstance(model, MoesaicForCausalLM)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(INPUT_IDS).logits


@pytest.mark.parametrize("arm", ["top_2", "adamoe", "not_pooled", "m16k4", "m24k5", "m32k6"])
def test_forks_start_as_the_model_they_come_from(checkpoint: Path, tmp_path: Path, arm: str):
    model = forked(checkpoint, tmp_path, arm)
    torch.testing.assert_close(logits(model), logits(load_model(checkpoint).eval()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arm", ["over_selected", "m32k4", "m32k5"])
def test_forks_that_the_paper_finds_worse_do_not(checkpoint: Path, tmp_path: Path, arm: str):
    model = forked(checkpoint, tmp_path, arm)
    assert (logits(model) - logits(load_model(checkpoint).eval())).abs().max() > 1e-4


def test_specs_of_the_forks(checkpoint: Path, tmp_path: Path):
    assert (with_nulls, as_it_is, random_skip) == tuple(
        EXPERIMENTS["adamoe"].arms[arm].fork for arm in ("adamoe", "top_2", "random_skip")
    )
    spec = forked(checkpoint, tmp_path, "not_pooled").config.spec
    assert (spec.router.to_dict()["num_null"], spec.router.to_dict()["top_k"]) == (8, 3)
    assert spec.balance[0].to_dict()["pool_nulls"] is False
    assert spec.balance[0].to_dict()["coefficient"]["end"] == 0.0003
    assert forked(checkpoint, tmp_path, "over_selected").config.spec.router.to_dict()["normalize_over"] == "selected"


@pytest.mark.parametrize(("load", "keep"), [(1.6, 0.6), (2.3, 0.99), (0.7, 0.01)])
def test_the_random_control_takes_the_load_of_adamoe(checkpoint: Path, tmp_path: Path, load: float, keep: float):
    model = forked(checkpoint, tmp_path, "random_skip", {"adamoe": {"load": load}})
    router = model.config.spec.router.to_dict()
    assert (router["type"], router["top_k"]) == ("random_skip", 2)
    assert router["keep"] == pytest.approx(keep)
