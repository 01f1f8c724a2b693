"""What balance losses are: per layer, on the picks that were made, and independent of how a step is cut up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.hf.tiny import assert_same_gradients, copy_of, gradients, tiny_model, token_ids
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moesaic import MoesaicForCausalLM

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def network(llama: MoesaicForCausalLM) -> MoesaicForCausalLM:
    """In training mode."""
    return copy_of(llama).train()


def ragged_batch() -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and labels of four sequences of 12, 9, 7 and 5 tokens, padded on the right; a prompt is not predicted."""
    ids, mask = token_ids(4, 12), torch.zeros(4, 12, dtype=torch.int64)
    for row, length in enumerate((12, 9, 7, 5)):
        mask[row, :length] = 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100
    return ids * mask, mask, labels


def num_predicted(labels: Tensor) -> int:
    return int((labels[:, 1:] != -100).sum())


def step(model: MoesaicForCausalLM, parts: list[slice], scale: float = 1.0) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one optimiser step over the ragged batch, cut into micro-batches."""
    model = copy_of(model)
    ids, mask, labels = ragged_batch()
    total = 0.0
    for part in parts:
        output = model(
            ids[part], attention_mask=mask[part], labels=labels[part], num_items_in_batch=num_predicted(labels)
        )
        (output.loss * scale).backward()
        total += output.loss.item()
    return total, gradients(model)


def test_layers_collapsed_on_different_experts_are_seen() -> None:
    """Pooled over layers, as in stock families, four layers that each use one expert of four look balanced."""
    model = tiny_model(
        "llama",
        {"num_hidden_layers": 4},
        router={"top_k": 1, "linear_bias": True},
        layers={},
        balance=[{"type": "load_balancing", "coefficient": 1.0}],
    ).train()
    with torch.no_grad():
        for layer, block in model.moe_blocks().items():
            block.gate.weight.zero_()
            block.gate.bias.copy_(20.0 * F.one_hot(torch.tensor(layer), 4))
    ids = token_ids()
    output = model(ids, labels=ids, output_router_logits=True, output_routing=True)
    (loss,) = model.balance
    for routing in output.routing.records.values():
        torch.testing.assert_close(loss.per_sequence(routing, output.routing), torch.full((2,), 4.0), **CLOSE)
    torch.testing.assert_close(output.aux_losses["load_balancing"], torch.tensor(16.0), **CLOSE)
    pooled = load_balancing_loss_func(output.router_logits, num_experts=4, top_k=1)
    torch.testing.assert_close(pooled, torch.tensor(1.0), **CLOSE)


def test_training_loss_is_cross_entropy_plus_balance(network: MoesaicForCausalLM) -> None:
    ids, mask, labels = ragged_batch()
    output = network(ids, attention_mask=mask, labels=labels)
    cross_entropy = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert set(output.aux_losses) == {"load_balancing", "z_loss"}
    assert all(loss > 0 for loss in output.aux_losses.values())
    torch.testing.assert_close(output.loss, cross_entropy + sum(output.aux_losses.values()), **CLOSE)


def test_evaluation_loss_is_cross_entropy_alone(llama: MoesaicForCausalLM) -> None:
    ids, mask, labels = ragged_batch()
    output = llama(ids, attention_mask=mask, labels=labels)
    cross_entropy = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, cross_entropy, **CLOSE)
    assert set(output.aux_losses) == {"load_balancing", "z_loss"}


def test_every_loss_trains_the_router(llama: MoesaicForCausalLM) -> None:
    ids = token_ids()
    for name in ("load_balancing", "z_loss"):
        output = llama(ids, labels=ids)
        gate = llama.moe_blocks()[2].gate.weight
        (gradient,) = torch.autograd.grad(output.aux_losses[name], gate)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_loss_nor_gradients(network: MoesaicForCausalLM, side: str) -> None:
    ids, results = token_ids(2, 8), []
    for padding in (0, 5):
        pad = (padding, 0) if side == "left" else (0, padding)
        mask, labels = F.pad(torch.ones_like(ids), pad), F.pad(ids, pad, value=-100)
        # Padding on the left would predict the first token, which a sequence without padding does not.
        labels[:, pad[0]] = -100
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        model = copy_of(network)
        output = model(F.pad(ids, pad), attention_mask=mask, position_ids=position_ids, labels=labels)
        output.loss.backward()
        results.append((output, gradients(model)))
    (plain, expected), (padded, actual) = results
    torch.testing.assert_close(padded.loss, plain.loss, **CLOSE)
    torch.testing.assert_close(padded.aux_losses, plain.aux_losses, **CLOSE)
    assert_same_gradients(actual, expected, **CLOSE)


@pytest.mark.parametrize(
    "parts",
    [
        [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)],
        [slice(0, 2), slice(2, 4)],
        [slice(0, 3), slice(3, 4)],
    ],
    ids=["4x1", "2x2", "3+1"],
)
def test_accumulation_changes_nothing(network: MoesaicForCausalLM, parts: list[slice]) -> None:
    loss, expected = step(network, [slice(0, 4)])
    accumulated, actual = step(network, parts)
    assert accumulated == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(actual, expected, **CLOSE)


def test_accumulation_changes_no_other_loss_either() -> None:
    kinds = [
        {"type": "load_balancing", "counts": "first"},
        {"type": "soft_load_balancing"},
        {"type": "importance"},
        {"type": "load"},
        {"type": "device_balance", "num_devices": 2},
        {"type": "communication_balance", "num_devices": 2, "devices_per_token": 1},
        {"type": "mutual_information"},
        {"type": "local_entropy"},
        {"type": "global_entropy", "min_experts": 4},
        {"type": "stable_balance"},
    ]
    balance = [{**kind, "coefficient": 0.3} for kind in kinds]
    # Noise comes from the seed of each forward pass, so there must be none for passes to be the same.
    model = tiny_model("llama", router={"type": "noisy_top_k", "top_k": 2, "noise": "fixed"}, balance=balance)
    for block in model.moe_blocks().values():
        block.gate.eval()
    model.training = True
    loss, expected = step(model, [slice(0, 4)])
    accumulated, actual = step(model, [slice(0, 1), slice(1, 4)])
    assert accumulated == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(actual, expected, **CLOSE)


def test_the_number_of_ranks_changes_nothing(network: MoesaicForCausalLM) -> None:
    """Data parallelism averages gradients; trainers multiply the loss by the number of ranks to make that a sum."""
    _, expected = step(network, [slice(0, 4)])
    ranks = [step(network, [part], scale=2.0)[1] for part in (slice(0, 2), slice(2, 4))]
    averaged = {name: (ranks[0][name] + ranks[1][name]) / 2 for name in expected}
    assert_same_gradients(averaged, expected, **CLOSE)


def test_the_number_of_predicted_tokens_may_be_a_tensor(network: MoesaicForCausalLM) -> None:
    ids = token_ids()
    number, tensor = (network(ids, labels=ids, num_items_in_batch=items) for items in (44, torch.tensor(44)))
    assert torch.equal(number.loss, tensor.loss)
    halved = network(ids, labels=ids)
    torch.testing.assert_close(number.loss * 2, halved.loss, **CLOSE)
    torch.testing.assert_close(number.aux_losses["z_loss"] * 2, halved.aux_losses["z_loss"], **CLOSE)


def test_the_order_of_sequences_changes_nothing(network: MoesaicForCausalLM) -> None:
    ids, mask, labels = ragged_batch()
    order = torch.tensor([2, 0, 3, 1])
    one = network(ids, attention_mask=mask, labels=labels)
    other = network(ids[order], attention_mask=mask[order], labels=labels[order])
    torch.testing.assert_close(other.loss, one.loss, **CLOSE)
    torch.testing.assert_close(other.aux_losses, one.aux_losses, **CLOSE)


def test_a_batch_without_targets_has_no_balance_loss(network: MoesaicForCausalLM) -> None:
    ids = token_ids()
    output = network(ids, labels=torch.full_like(ids, -100), num_items_in_batch=10)
    assert output.loss == 0
    assert all(loss == 0 for loss in output.aux_losses.values())


def test_coefficients_scale_their_loss(llama: MoesaicForCausalLM) -> None:
    ids = token_ids()
    stronger = tiny_model("llama", balance=[{"type": "load_balancing", "coefficient": 0.3}])
    expected = 3 * llama(ids, labels=ids).aux_losses["load_balancing"]
    torch.testing.assert_close(stronger(ids, labels=ids).aux_losses, {"load_balancing": expected}, **CLOSE)


def test_coefficients_follow_the_progress_of_the_training(llama: MoesaicForCausalLM) -> None:
    ids = token_ids()
    value = llama(ids, labels=ids).aux_losses["load_balancing"] / 0.1
    schedule = {"start": 0.02, "end": 1e-4, "shape": "step", "begin": 0.5}
    model = tiny_model("llama", balance=[{"type": "load_balancing", "coefficient": schedule}])
    for progress, coefficient in ((None, 0.02), (0.4, 0.02), (0.5, 1e-4)):
        if progress is not None:
            model.set_training_progress(progress)
        output = model(ids, labels=ids)
        torch.testing.assert_close(output.aux_losses, {"load_balancing": coefficient * value}, **CLOSE)
        assert output.loss.dtype == torch.float32


def test_adaptive_coefficients_differ_by_layer_and_are_saved(llama: MoesaicForCausalLM, tmp_path: Path) -> None:
    ids = token_ids()
    adaptive = {"capacity_factor": 1.0}
    loss = {"type": "load_balancing", "coefficient": 0.1, "adaptive": adaptive}
    model = tiny_model("llama", balance=[loss])
    plain = llama(ids, labels=ids, output_routing=True)
    torch.testing.assert_close(model(ids, labels=ids).aux_losses["load_balancing"], plain.aux_losses["load_balancing"])
    for layer, block in model.moe_blocks().items():
        block.adaptive_coefficients.fill_(float(layer))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = MoesaicForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for layer, block in loaded.moe_blocks().items():
        assert block.adaptive_coefficients.dtype == torch.float32
        assert block.adaptive_coefficients.tolist() == [layer]
    values = {
        layer: model.balance[0].per_sequence(routing, plain.routing).mean()
        for layer, routing in plain.routing.records.items()
    }
    expected = sum(layer * value for layer, value in values.items())
    actual = loaded.float()(ids, labels=ids).aux_losses["load_balancing"]
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0)
