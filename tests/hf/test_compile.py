"""`torch.compile` takes the whole forward pass as one graph, backward included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.hf.tiny import assert_same_gradients, copy_of, gradients, tiny_model, token_ids

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


@pytest.mark.parametrize("router", [{"type": "hash", "vocabulary_size": 64}, {"type": "random", "top_k": 2}], ids=str)
def test_training_step_of_a_router_that_learns_nothing(router: dict[str, Any]) -> None:
    """Its records carry no gradient, and still nothing is recomputed."""
    model, ids = tiny_model(router=router).train(), token_ids()
    expected = copy_of(model)
    torch.manual_seed(0)
    expected(ids, labels=ids).loss.backward()
    torch.manual_seed(0)
    torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss.backward()
    assert_same_gradients(gradients(model), gradients(expected), rtol=1e-5, atol=1e-6)


def test_moving_coefficients_do_not_compile_again() -> None:
    balance = [
        {"type": "load_balancing", "coefficient": {"start": 0.1, "end": 0.0}},
        {"type": "z_loss", "coefficient": 0.1, "adaptive": {"capacity_factor": 1.0}},
    ]
    ids, model = token_ids(), tiny_model("llama", balance=balance).train()
    compilations = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> Callable[..., Any]:
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=count)
    for step in range(4):
        model.set_training_progress(step / 4)
        for block in model.moe_blocks().values():
            block.adaptive_coefficients.fill_(0.1 * step)
        expected, actual = model(ids, labels=ids), compiled(ids, labels=ids)
        torch.testing.assert_close(actual.aux_losses, expected.aux_losses)
    assert len(compilations) == 1


@pytest.mark.slow  # the C++ compiler takes its time
@torch.no_grad()
def test_default_backend(llama: MoesaicForCausalLM) -> None:
    ids = token_ids()
    actual = torch.compile(copy_of(llama), fullgraph=True)(ids).logits
    torch.testing.assert_close(actual, llama(ids).logits, rtol=1e-5, atol=1e-5)
