"""Upcycling: the same function at step 0, or a refusal; afterwards an ordinary MoE model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.hf.tiny import DENSE_FAMILIES, VOCABULARY, dense_model, token_ids
from tests.layer.router_rows import ROUTERS
from tests.layer.router_rows import N as NUM_ROUTED
from tests.parity.stock_models import stock_model
from transformers import PreTrainedModel

import moesaic
from moesaic.errors import ConfigError, UnsupportedModel
from moesaic.layer import MoESpec
from moesaic.transform import copy_spec, upcycle

# Experts and dense layers sum in different orders; gemma3 scales its residuals up.
CLOSE = {"rtol": 1e-4, "atol": 3e-5}


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return dense_model("llama")


def spec_for(model: PreTrainedModel, **changes: dict[str, Any]) -> MoESpec:
    """The function-preserving spec with fields of its sections replaced."""
    values = copy_spec(model, num_experts=4, top_k=2).to_dict()
    for section, fields in changes.items():
        values[section] = {**(values.get(section) or {}), **fields}
    return MoESpec.from_dict(values, where="moe")


@pytest.mark.parametrize("model_type", DENSE_FAMILIES)
@torch.no_grad()
def test_logits_are_kept(model_type: str) -> None:
    dense, ids = dense_model(model_type), token_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model = moesaic.upcycle(dense, copy_spec(dense, num_experts=4, top_k=3))
    expected, actual = dense(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize(
    "changes",
    [
        {"router": {"score_function": "sigmoid", "selection_bias": True}},
        {"router": {"softmax_over": "selected", "normalize_top_k": False}},
        {"router": {"num_groups": 2, "top_k_groups": 1}},
        {"shared_experts": {"num_experts": 2}},
        {"shared_experts": {"num_experts": 1, "intermediate_size": 20, "sigmoid_gate": True}},
        {"layers": {"first_dense": 1, "every": 2}},
        {"layers": {"only": [0, 2]}},
        {"layers": {"num_experts": [2, 4, 6]}},
        {"layers": {"top_k": [1, 4, 2]}},
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_are_kept_with_other_routers_shared_experts_and_placements(
    dense: PreTrainedModel, changes: dict[str, dict[str, Any]]
) -> None:
    model, ids = upcycle(dense, spec_for(dense, **changes)), token_ids()
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, **CLOSE)


@torch.no_grad()
def test_every_expert_is_a_copy(dense: PreTrainedModel) -> None:
    model = upcycle(dense, spec_for(dense))
    for layer, block in model.moe_blocks().items():
        source = dense.base_model.layers[layer].mlp
        both = torch.cat([source.gate_proj.weight, source.up_proj.weight])
        for expert in range(4):
            assert torch.equal(block.experts.gate_up_proj[expert], both)
            assert torch.equal(block.experts.down_proj[expert], source.down_proj.weight)


@torch.no_grad()
def test_experts_with_biases() -> None:
    dense = dense_model("gpt2")
    model = upcycle(dense, spec_for(dense))
    block, source = model.moe_blocks()[1], dense.base_model.h[1].mlp
    assert torch.equal(block.experts.up_proj[2], source.c_fc.weight.t())
    assert torch.equal(block.experts.up_proj_bias[2], source.c_fc.bias)
    assert torch.equal(block.experts.down_proj_bias[0], source.c_proj.bias)


@torch.no_grad()
def test_shared_experts_start_silent_and_learn(dense: PreTrainedModel) -> None:
    model = upcycle(dense, spec_for(dense, shared_experts={"num_experts": 2}))
    shared = model.moe_blocks()[0].shared_experts
    assert not shared(torch.randn(3, 32)).any()
    assert shared.up_proj.weight.any()
    with torch.enable_grad():
        model.train()(token_ids(), labels=token_ids()).loss.backward()
    assert shared.down_proj.weight.grad.any()


@torch.no_grad()
def test_noise_makes_experts_differ_by_its_size(dense: PreTrainedModel) -> None:
    model = upcycle(dense, spec_for(dense), noise=0.5, exact=False)
    experts, source = model.moe_blocks()[1].experts, dense.base_model.layers[1].mlp.down_proj.weight
    for expert in range(4):
        assert (experts.down_proj[expert] - source).std() / source.std() == pytest.approx(0.5, rel=0.1)
        assert not torch.equal(experts.down_proj[expert], experts.down_proj[(expert + 1) % 4])
    assert not torch.allclose(model(token_ids()).logits, dense(token_ids()).logits, atol=1e-2)


def test_inexact_recipes_are_possible_when_asked_for(dense: PreTrainedModel) -> None:
    spec = spec_for(dense, router={"normalize_top_k": False, "scaling_factor": 2.0})
    assert upcycle(dense, spec, exact=False)(token_ids()).logits.isfinite().all()


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_seed_decides_everything_random(dense: PreTrainedModel, noise: float) -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        return upcycle(dense, spec_for(dense), noise=noise, exact=False, seed=seed).state_dict()

    before = torch.random.get_rng_state()
    first, again, other = state(0), state(0), state(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    differing = {name.split(".mlp.")[-1] for name, tensor in first.items() if not torch.equal(tensor, other[name])}
    expected = {"gate.weight"} | ({"experts.gate_up_proj", "experts.down_proj"} if noise else set())
    assert differing == expected


def test_layers_get_different_routers(dense: PreTrainedModel) -> None:
    gates = [block.gate.weight for block in upcycle(dense, spec_for(dense)).moe_blocks().values()]
    assert not torch.equal(gates[0], gates[1])


def test_the_dense_model_is_left_alone(dense: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    model = upcycle(dense, spec_for(dense)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(4):
        loss = model(token_ids(), labels=token_ids()).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert not dense.training


def test_dtype_mode_and_generation_settings_are_taken_over() -> None:
    dense = dense_model("llama").to(torch.bfloat16)
    dense.generation_config.max_new_tokens = 3
    model = upcycle(dense, spec_for(dense, router={"score_function": "sigmoid", "selection_bias": True}))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.moe_blocks()[0].gate.e_score_correction_bias.dtype == torch.float32
    assert not model.training
    assert model.generation_config.max_new_tokens == 3
    assert model.config.backbone.model_type == "llama"
    torch.testing.assert_close(model(token_ids()).logits, dense(token_ids()).logits, rtol=0.1, atol=0.1)


def test_tied_embeddings_stay_tied() -> None:
    dense = dense_model("llama", tie_word_embeddings=True)
    model = upcycle(dense, spec_for(dense))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight is not dense.lm_head.weight


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"experts": {"intermediate_size": 40}}, {}, "moe.experts.intermediate_size = 40 .*set it to 48"),
        ({"experts": {"gated": False}}, {}, "moe.experts.gated = False .*set it to True"),
        ({"experts": {"bias": True}}, {}, "moe.experts.bias = True .*set it to False"),
        ({"experts": {"activation": "relu"}}, {}, "moe.experts.activation = 'relu' .*set it to 'silu'"),
        ({"router": {"normalize_top_k": False}}, {}, "moe.router.normalize_top_k = False .*exact=False"),
        (
            {"router": {"normalization_epsilon": 0.01}},
            {},
            "moe.router.normalization_epsilon = 0.01 .*set it to 0",
        ),
        ({"router": {"normalization_floor": 0.5}}, {}, "moe.router.normalization_floor = 0.5 .*set it to 0"),
        ({"router": {"normalization_order": 2.0}}, {}, "moe.router.normalization_order = 2.0 .*set it to 1"),
        ({"router": {"scaling_factor": 2.0}}, {}, "moe.router.scaling_factor = 2.0 .*set it to 1.0"),
        ({}, {"noise": 0.1}, "noise = 0.1 .*exact=False"),
        ({"layers": {"only": [5]}}, {}, "layers.only = 5 .*choose 0 to 2"),
        ({"capacity": {"factor": 1.0}}, {}, "moe.capacity = .*exact=False"),
        ({"depth": {"capacity": 0.5}}, {}, "moe.depth = .*exact=False"),
    ],
    ids=str,
)
def test_refusals(dense: PreTrainedModel, changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        upcycle(dense, spec_for(dense, **changes), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_is_possible_when_asked_for(name: str, dtype: torch.dtype) -> None:
    """Cells that layers share, tables of integers and buffers in full precision arrive as a fresh model has them."""
    dense = dense_model("llama").to(dtype)
    router = ROUTERS[name].values
    if "vocabulary_size" in router:
        router = {**router, "vocabulary_size": VOCABULARY}
    values = copy_spec(dense, num_experts=NUM_ROUTED, top_k=1).to_dict() | {"router": router}
    values["balance"] = [{"type": "load_balancing", "coefficient": 0.1, "adaptive": {"capacity_factor": 1.0}}]
    spec = MoESpec.from_dict(values, where="moe")
    model, fresh = upcycle(dense, spec, exact=False), moesaic.build(dense.config, spec).to(dtype)
    expected = {name: (tensor.dtype, tensor.shape) for name, tensor in fresh.state_dict().items()}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()} == expected
    trained = {name: parameter.requires_grad for name, parameter in fresh.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    ids = token_ids()
    labels = {"modality_ids": ids % 2, "task_ids": torch.zeros(len(ids), dtype=torch.int64)}
    assert model.train()(ids, labels=ids, **labels).loss.isfinite()


def test_shape_is_checked_for_inexact_recipes_too(dense: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="intermediate_size"):
        upcycle(dense, spec_for(dense, experts={"intermediate_size": 40}), exact=False)


def test_more_picks_than_experts_are_refused(dense: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="top_k"):
        copy_spec(dense, num_experts=4, top_k=5)


def test_a_model_with_experts_is_sent_to_convert() -> None:
    with pytest.raises(UnsupportedModel, match=r"mixtral.*moesaic\.convert"):
        copy_spec(stock_model("mixtral"), num_experts=4, top_k=2)


def test_a_moesaic_model_is_refused(dense: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedModel, match="has MoE layers already"):
        upcycle(upcycle(dense, spec_for(dense)), spec_for(dense))


def test_a_spec_may_be_a_dict(dense: PreTrainedModel) -> None:
    spec = spec_for(dense)
    given, read = upcycle(dense, spec.to_dict()).state_dict(), upcycle(dense, spec).state_dict()
    assert all(torch.equal(given[name], tensor) for name, tensor in read.items())
    with pytest.raises(ConfigError, match=r"^moe\.router\.topk = 2 is not a known key"):
        upcycle(dense, {**spec.to_dict(), "router": {"topk": 2}})
