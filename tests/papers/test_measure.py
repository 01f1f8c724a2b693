from __future__ import annotations

import math

import pytest
import torch

from moesaic.data import prepare_data
from moesaic.layer import max_violation
from moesaic.papers import Reproduction, Trained
from moesaic.papers.adamoe import _flops, _load_by_frequency
from moesaic.papers.measure import balance, loss, scores_by_layer, trace
from moesaic.papers.result import CHECKPOINTS
from moesaic.trace import account
from moesaic.train import CheckpointStore, RunConfig, load_model


@pytest.fixture(scope="module")
def trained(finished: Reproduction) -> Trained:
    """The arm `moe` of the tiny experiment."""
    folder = finished.output / "seed-0" / "moe"
    run = RunConfig.from_yaml(folder / "run.yaml")
    checkpoint = CheckpointStore(folder / CHECKPOINTS, 1).latest()
    assert checkpoint is not None
    data = prepare_data(run.data, finished.output / "data", progress=False)
    return Trained("moe", run, load_model(checkpoint).eval(), data)


def test_the_loss_is_that_of_the_last_evaluation(trained: Trained, finished: Reproduction):
    assert loss(trained) == pytest.approx(finished.results[0]["moe"].measurements["loss"], rel=1e-5)


def test_balance_is_that_of_the_trace(trained: Trained):
    traced = trace(trained)
    [layer] = traced.layers.values()
    assert set(layer.domain_loads) == {"prose", "tables"}
    found = balance(traced)
    assert found["max_violation"] == found["max_violation.worst"] == float(max_violation(layer.load_N))
    assert 0 <= found["domain_information"] <= math.log(2)


def test_scores_of_the_layers_are_of_real_tokens(trained: Trained):
    [scores_TN] = scores_by_layer(trained, max_tokens=64).values()
    assert scores_TN.shape[1] == 4
    torch.testing.assert_close(scores_TN.sum(-1), torch.ones(len(scores_TN)))


def test_flops_follow_the_load(trained: Trained):
    whole = account(trained.model, context_length=trained.run.data.sequence_length).flops_per_token() / 1e6
    one_expert = 2 * 3 * 16 * 16 / 1e6
    assert _flops(trained, 2.0) == pytest.approx(whole)
    assert _flops(trained, 1.5) == pytest.approx(whole - one_expert / 2)


def test_load_by_frequency_of_a_worked_example():
    ids_T = torch.tensor([7, 7, 7, 1, 2, 3])
    count_T = torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0, 3.0])
    assert _load_by_frequency({0: (count_T, ids_T)}) == pytest.approx((7 / 3, 1 / 3))
