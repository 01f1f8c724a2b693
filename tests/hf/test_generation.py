"""`generate`: every way of decoding gives what the plain forward pass gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.hf.tiny import token_ids
from torch import Tensor

from moesaic import MoesaicForCausalLM, build

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@torch.no_grad()
def greedy(model: MoesaicForCausalLM, ids: Tensor, steps: int = 8) -> Tensor:
    """Greedy decoding by whole forward passes."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_greedy_with_and_without_cache(model: MoesaicForCausalLM) -> None:
    ids = token_ids(2, 9)
    expected = greedy(model, ids)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), expected)


def test_left_padding(model: MoesaicForCausalLM) -> None:
    short, long = token_ids(1, 5, seed=5), token_ids(1, 9, seed=6)
    batch = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], dim=1), long])
    mask = (batch != 0).long()
    generated = model.generate(batch, attention_mask=mask, **GREEDY)
    assert torch.equal(generated[0, 4:], model.generate(short, **GREEDY)[0])
    assert torch.equal(generated[1], model.generate(long, **GREEDY)[0])


@torch.no_grad()
def test_beam_search_finds_what_is_at_least_as_likely(model: MoesaicForCausalLM) -> None:
    ids = token_ids(2, 6)

    def log_likelihood(sequence: Tensor) -> Tensor:
        scores = model(sequence).logits[:, 5:-1].log_softmax(-1)
        return scores.gather(-1, sequence[:, 6:, None]).sum((1, 2))

    options = {**GREEDY, "max_new_tokens": 4}
    beams = model.generate(ids, num_beams=64, return_dict_in_generate=True, output_scores=True, **options)
    found = log_likelihood(beams.sequences)
    torch.testing.assert_close(beams.sequences_scores * 4, found, rtol=1e-4, atol=1e-4)
    assert (found >= log_likelihood(model.generate(ids, **options)) - 1e-4).all()


def test_sampling_is_reproducible(model: MoesaicForCausalLM) -> None:
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(
            model.generate(token_ids(), max_new_tokens=8, do_sample=True, temperature=2.0, eos_token_id=None)
        )
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_end_of_sequence_stops(llama: MoesaicForCausalLM) -> None:
    ids = token_ids(1, 6)
    free = model_output = llama.generate(ids, **GREEDY)
    stop = free[0, 8].item()
    model_output = llama.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=stop)
    assert model_output[0, -1] == stop
    assert model_output.shape[1] <= 9


@pytest.mark.parametrize("output_router_logits", [False, True])
def test_routing_can_be_heard_step_by_step(llama: MoesaicForCausalLM, output_router_logits: bool) -> None:
    tokens = []
    handle = llama.model.add_routing_listener(lambda context: tokens.append(len(context.records[1].index_TK)))
    try:
        llama.generate(token_ids(2, 6), output_router_logits=output_router_logits, **GREEDY)
    finally:
        handle.remove()
    assert tokens == [12] + [2] * 7


@torch.no_grad()
@pytest.mark.parametrize("kind", ["task", "modality"])
def test_what_the_text_is_stays_with_it(kind: str) -> None:
    routers = {
        "task": {"type": "task", "num_tasks": 2, "top_k": 2},
        "modality": {"type": "modality", "banks": [2, 2], "top_k": 1},
    }
    torch.manual_seed(0)
    moe = {"experts": {"num_experts": 4, "intermediate_size": 16}, "router": routers[kind]}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = build({"model_type": "llama", "vocab_size": 64, "initializer_range": 0.3, **sizes}, moe).eval()
    ids = torch.randint(64, (2, 6))
    labels = {"task": torch.tensor([1, 0]), "modality": torch.tensor([[0] * 5 + [1], [1] * 5 + [0]])}[kind]
    expected, grown = ids, labels
    for _ in range(8):  # what is generated is of the last token's modality
        logits = model(expected, **{f"{kind}_ids": grown}).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
        grown = grown if kind == "task" else torch.cat([grown, grown[:, -1:]], dim=1)
    given = {f"{kind}_ids": labels}
    assert torch.equal(model.generate(ids, **given, **GREEDY), expected)
    assert torch.equal(model.generate(ids, **given, use_cache=False, **GREEDY), expected)
    assert torch.equal(model.generate(ids, **given, cache_implementation="static", **GREEDY), expected)
    assert not torch.equal(model.generate(ids, **{f"{kind}_ids": 1 - labels}, **GREEDY), expected)
    beams = {**GREEDY, "num_beams": 3}
    alone = [model.generate(ids[n : n + 1], **{f"{kind}_ids": labels[n : n + 1]}, **beams)[0] for n in (0, 1)]
    assert torch.equal(model.generate(ids, **given, **beams), torch.stack(alone))
