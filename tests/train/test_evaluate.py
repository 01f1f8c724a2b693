from __future__ import annotations

import math

import pytest
import torch
from tests.train.builders import DOMAINS, tiny_run
from torch.nn.functional import cross_entropy

from moesaic.train import Evaluation, build_model, evaluate, overall


@pytest.mark.parametrize("moe", [True, False])
def test_loss_is_the_mean_over_all_predicted_tokens_of_a_domain(data, moe):
    model = build_model(tiny_run(data.config, moe=moe), data.tokenizer).eval()
    result = evaluate(model, data.validation_batches())
    assert set(result) == set(DOMAINS)
    for domain, batches in data.validation_batches(batch_size=1).items():
        losses = []
        for batch in batches:
            with torch.no_grad():
                logits = model(batch["input_ids"]).logits
            labels = batch["labels"][0, 1:]
            losses.append(cross_entropy(logits[0, :-1], labels, reduction="none")[labels != -100])
        expected = torch.cat(losses)
        assert result[domain].tokens == len(expected)
        assert result[domain].loss == pytest.approx(expected.mean().item(), rel=1e-5)
        assert result[domain].perplexity == pytest.approx(math.exp(result[domain].loss))


def test_evaluation_leaves_mode_random_state_and_gradients_alone(data):
    model = build_model(tiny_run(data.config), data.tokenizer).train()
    before = torch.get_rng_state()
    evaluate(model, data.validation_batches(), max_batches=1)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_max_batches_limits_each_domain(data):
    model = build_model(tiny_run(data.config), data.tokenizer)
    batches = {"x": [next(data.train_batches())] * 5}
    assert evaluate(model, batches, max_batches=2)["x"].tokens == 2 * 4 * 31


def test_overall_counts_each_token_once():
    found = overall(
        {"a": Evaluation.from_sum(2.0, 1), "b": Evaluation.from_sum(3.0, 3), "c": Evaluation.from_sum(0, 0)}
    )
    assert (found.loss, found.tokens) == (5 / 4, 4)


def test_an_empty_domain_is_nan_and_a_hopeless_one_has_infinite_perplexity():
    assert math.isnan(Evaluation.from_sum(0.0, 0).loss)
    assert Evaluation.from_sum(1e6, 1).perplexity == math.inf
