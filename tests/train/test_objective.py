from __future__ import annotations

import pytest
import torch
from tests.train.builders import tiny_run
from torch.nn.functional import cross_entropy

from moesaic.train import build_model
from moesaic.train.objective import language_model_objective, model_inputs, predicted_tokens


@pytest.fixture
def ragged(data):
    """A batch whose sequences have different numbers of predicted tokens."""
    inputs = model_inputs(next(data.train_batches()), torch.device("cpu"))
    labels = inputs["labels"].clone()
    for row, kept in enumerate((32, 20, 7, 2)):
        labels[row, kept:] = -100
    return {**inputs, "labels": labels}


def test_the_first_label_of_a_sequence_is_not_predicted(ragged):
    assert predicted_tokens([ragged]) == 31 + 19 + 6 + 1


@pytest.mark.parametrize("moe", [True, False])
def test_cross_entropy_is_separate_from_balance_losses(data, ragged, moe):
    model = build_model(tiny_run(data.config, moe=moe), data.tokenizer).train()
    objective = language_model_objective(model, ragged, predicted_tokens([ragged]))
    logits, labels = model(ragged["input_ids"]).logits[:, :-1], ragged["labels"][:, 1:]
    assert objective.cross_entropy.item() == pytest.approx(
        cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), rel=1e-5
    )
    assert set(objective.aux_losses) == ({"load_balancing", "z_loss"} if moe else set())
    total = objective.cross_entropy + sum(objective.aux_losses.values())
    assert objective.loss.item() == pytest.approx(float(total), rel=1e-6)
    assert (objective.routing is not None) is moe


@pytest.mark.parametrize("moe", [True, False])
def test_shares_of_ragged_micro_batches_add_up(data, ragged, moe):
    model = build_model(tiny_run(data.config, moe=moe), data.tokenizer).double().train()
    num_items = predicted_tokens([ragged])

    def losses_and_gradients(sizes: list[int]):
        model.zero_grad()
        chunks = {name: tensor.split(sizes) for name, tensor in ragged.items()}
        objectives = []
        for index in range(len(sizes)):
            micro_batch = {name: parts[index] for name, parts in chunks.items()}
            objectives.append(language_model_objective(model, micro_batch, num_items))
            objectives[-1].loss.backward()
        total = sum(objective.loss.item() for objective in objectives)
        return total, [parameter.grad.clone() for parameter in model.parameters()]

    whole, whole_gradients = losses_and_gradients([4])
    for sizes in ([1, 1, 1, 1], [3, 1]):
        split, split_gradients = losses_and_gradients(sizes)
        assert split == pytest.approx(whole, abs=1e-6)
        torch.testing.assert_close(split_gradients, whole_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("moe", [True, False])
def test_output_z_loss_is_over_predicted_tokens_of_the_whole_step(data, ragged, moe):
    model = build_model(tiny_run(data.config, moe=moe), data.tokenizer).train()
    items = predicted_tokens([ragged])
    plain = language_model_objective(model, ragged, items)
    objective = language_model_objective(model, ragged, items, 0.5)
    z_BS = model(ragged["input_ids"]).logits[:, :-1].logsumexp(-1).square()
    expected = 0.5 * z_BS[ragged["labels"][:, 1:] != -100].mean()
    assert objective.aux_losses["output_z_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert objective.cross_entropy.item() == pytest.approx(plain.cross_entropy.item(), rel=1e-6)
    assert objective.loss.item() == pytest.approx(plain.loss.item() + expected.item(), rel=1e-6)
    halves = [
        language_model_objective(model, {k: v[rows] for k, v in ragged.items()}, items, 0.5)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    total = sum(half.aux_losses["output_z_loss"].item() for half in halves)
    assert total == pytest.approx(expected.item(), rel=1e-5)
