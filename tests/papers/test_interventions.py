from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moesaic
from moesaic.errors import UnsupportedModel
from moesaic.hf import MoesaicForCausalLM
from moesaic.layer import Routing
from moesaic.papers.interventions import more_picks, rerouted, without_best, without_shared_experts

INPUT_IDS = torch.arange(24).view(1, 24)
BACKBONE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
}


@pytest.fixture
def model() -> MoesaicForCausalLM:
    torch.manual_seed(0)
    moe = {
        "experts": {"num_experts": 6, "intermediate_size": 16},
        "router": {"top_k": 2},
        "shared_experts": {"num_experts": 1},
    }
    return moesaic.build(BACKBONE, moe).eval()


@torch.no_grad()
def first_routing(model: MoesaicForCausalLM) -> Routing:
    return model(INPUT_IDS, output_routing=True).routing.records[0]


@torch.no_grad()
def logits(model: MoesaicForCausalLM) -> torch.Tensor:
    return model(INPUT_IDS).logits


def test_the_best_experts_are_passed_over(model: MoesaicForCausalLM):
    ranked = first_routing(model).scores_TN.sort(descending=True)
    with rerouted(model, without_best(2)):
        changed = first_routing(model)
    assert torch.equal(changed.index_TK, ranked.indices[:, 2:4])
    assert torch.equal(changed.weight_TK, ranked.values[:, 2:4])
    with rerouted(model, without_best(0)):
        same = logits(model)
    assert torch.equal(same, logits(model))


def test_more_picks_are_the_next_best(model: MoesaicForCausalLM):
    ranked = first_routing(model).scores_TN.sort(descending=True)
    with rerouted(model, more_picks(1)):
        changed = first_routing(model)
    assert torch.equal(changed.index_TK, ranked.indices[:, :3])
    assert torch.equal(changed.weight_TK, ranked.values[:, :3])


def test_shared_experts_are_off_inside_the_block_only(model: MoesaicForCausalLM):
    before = logits(model)
    with without_shared_experts(model):
        inside = logits(model)
    assert torch.equal(logits(model), before)
    for block in model.moe_blocks().values():
        assert block.shared_experts is not None
        torch.nn.init.zeros_(block.shared_experts.down_proj.weight)
    assert torch.equal(inside, logits(model))
    assert not torch.equal(inside, before)


def test_an_error_inside_leaves_the_model_as_it_was(model: MoesaicForCausalLM):
    before = logits(model)
    with pytest.raises(ZeroDivisionError), rerouted(model, without_best(2)):
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)


def test_dense_models_are_refused():
    dense = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in BACKBONE.items() if key != "model_type"}))
    with pytest.raises(UnsupportedModel, match="has no MoE layers of moesaic"), rerouted(dense, without_best(1)):
        pass
