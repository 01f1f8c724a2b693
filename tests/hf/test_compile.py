"""`torch.compile` takes the whole forward pass as one graph, backward included."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.hf.tiny import assert_same_gradients, copy_of, gradients, token_ids

from moesaic import MoesaicForCausalLM


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"], scope="session")
@torch.no_grad()
def test_forward_is_one_graph(model: MoesaicForCausalLM) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for ids in (token_ids(2, 12), token_ids(3, 7)):
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        expected = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
        actual = compiled(ids, attention_mask=mask, labels=ids, output_router_logits=True)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(actual.loss, expected.loss)
        torch.testing.assert_close(actual.aux_losses, expected.aux_losses)


def test_training_step(llama: MoesaicForCausalLM) -> None:
    ids, expected = token_ids(), copy_of(llama).train()
    expected(ids, labels=ids, num_items_in_batch=30).loss.backward()
    model = copy_of(llama).train()
    torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids, num_items_in_batch=30).loss.backward()
    assert_same_gradients(gradients(model), gradients(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # the C++ compiler takes its time
@torch.no_grad()
def test_default_backend(llama: MoesaicForCausalLM) -> None:
    ids = token_ids()
    actual = torch.compile(copy_of(llama), fullgraph=True)(ids).logits
    torch.testing.assert_close(actual, llama(ids).logits, rtol=1e-5, atol=1e-5)
