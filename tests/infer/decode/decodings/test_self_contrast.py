"""Self-contrast against the loop that its paper describes, written down plainly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

import moesaic


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        eos_token_id=None,
        pad_token_id=0,
    )
    made = MixtralForCausalLM(config).eval()
    made.lm_head.weight.data *= 30  # of a flat distribution every token is plausible
    return made


@torch.no_grad()
def reference(model: PreTrainedModel, ids_BS: Tensor, weak: str, alpha: float, beta: float, new_tokens: int) -> Tensor:
    """Greedy self-contrast without caches."""
    for _ in range(new_tokens):
        strong_BV = model(ids_BS).logits[:, -1]
        with moesaic.override_routing(model, weak):
            weak_BV = model(ids_BS).logits[:, -1]
        masked_BV = strong_BV < strong_BV.max(-1, keepdim=True).values + math.log(alpha)
        scores_BV = ((1 + beta) * strong_BV - beta * weak_BV).masked_fill(masked_BV, -torch.inf)
        ids_BS = torch.cat([ids_BS, scores_BV.argmax(-1, keepdim=True)], 1)
    return ids_BS


@pytest.mark.parametrize("plan", ["two_rows", "two_passes"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_equals_the_reference_loop(model, plan, use_cache):
    ids_BS = torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = torch.cat([reference(model, row, "rank=2", 0.1, 0.5, 16) for row in ids_BS.split(1)])
    options = {"max_new_tokens": 16, "do_sample": False, "use_cache": use_cache}
    found = model.generate(ids_BS, custom_generate=moesaic.SelfContrast(beta=0.5, plan=plan), **options)
    assert torch.equal(found, expected)
    assert not torch.equal(found, model.generate(ids_BS, **options))
