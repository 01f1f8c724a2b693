"""Recomputing layers in backward changes no gradient, those of balance losses included."""

from __future__ import annotations

import pytest
import torch
from tests.hf.tiny import assert_same_gradients, copy_of, gradients, token_ids

from moesaic import MoesaicForCausalLM

# Newer versions of transformers rename these methods and keep the names that all supported versions have.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
kinds = pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])


def training(model: MoesaicForCausalLM, reentrant: bool | None) -> MoesaicForCausalLM:
    model = copy_of(model).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing
        # Without an input that requires grad, reentrant checkpointing gives the first layer no gradient.
        model.enable_input_require_grads()
    return model


@kinds
def test_gradients_equal_those_without(model: MoesaicForCausalLM, reentrant: bool) -> None:
    ids, results = token_ids(), []
    for kind in (None, reentrant):
        network = training(model, kind)
        output = network(ids, labels=ids)
        output.loss.backward()
        results.append((output.loss, gradients(network)))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_gradients(results[1][1], results[0][1], rtol=1e-6, atol=1e-7)


@kinds
def test_balance_gradients_are_not_lost(llama: MoesaicForCausalLM, reentrant: bool) -> None:
    ids = token_ids()
    labels = ids.masked_fill(torch.arange(12) > 1, -100)
    with_balance, without = training(llama, reentrant), training(llama, reentrant)
    without.balance = ()
    gate = {}
    for name, network in (("with", with_balance), ("without", without)):
        network(ids, labels=labels).loss.backward()
        gate[name] = network.moe_blocks()[1].gate.weight.grad
    share = gate["with"] - gate["without"]
    assert share.norm() > 0.01 * gate["without"].norm()


@kinds
def test_several_open_forward_passes(model: MoesaicForCausalLM, reentrant: bool) -> None:
    batches = [token_ids(2, 12, seed=3), token_ids(1, 9, seed=4)]
    expected = training(model, None)
    for ids in batches:
        expected(ids, labels=ids).loss.backward()

    network = training(model, reentrant)
    losses = [network(ids, labels=ids).loss for ids in batches]
    for loss in losses:
        loss.backward()
    assert_same_gradients(gradients(network), gradients(expected), rtol=1e-5, atol=1e-6)


@kinds
def test_loss_scaling_scales_balance_gradients(llama: MoesaicForCausalLM, reentrant: bool) -> None:
    ids, results = token_ids(), []
    for kind, scale in ((None, 1.0), (reentrant, 1024.0)):
        network = training(llama, kind)
        (network(ids, labels=ids).loss * scale).backward()
        results.append(gradients(network))
    # A power of two changes exponents only.
    scaled = {name: gradient / 1024.0 for name, gradient in results[1].items()}
    assert_same_gradients(scaled, results[0], rtol=1e-6, atol=1e-7)


@kinds
def test_evaluation_in_between(llama: MoesaicForCausalLM, reentrant: bool) -> None:
    ids, expected = token_ids(), training(llama, None)
    expected(ids, labels=ids).loss.backward()
    network = training(llama, reentrant)
    loss = network(ids, labels=ids).loss
    with torch.no_grad():
        network.eval()(token_ids(1, 5))
    network.train()
    loss.backward()
    assert_same_gradients(gradients(network), gradients(expected), rtol=1e-6, atol=1e-7)


def test_it_can_be_switched_off(llama: MoesaicForCausalLM) -> None:
    network = training(llama, True)
    network.gradient_checkpointing_disable()
    assert not network.is_gradient_checkpointing
