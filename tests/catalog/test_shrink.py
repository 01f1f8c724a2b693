"""Shrunk presets: small enough to train here, and of the same design."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moesaic.catalog import Preset, preset, presets, shrink
from moesaic.catalog.shrink import SPECIAL_TOKENS
from moesaic.errors import ConfigError
from moesaic.hf import build
from moesaic.layer import MoESpec

# Fields of a router that are numbers of experts.
SIZES = {"top_k", "num_null", "num_groups", "top_k_groups"}


def is_dense(found: Preset) -> bool:
    layers = found.backbone["num_hidden_layers"]
    return len(found.moe.layers.indices(layers)) < layers


@pytest.mark.parametrize("name", presets())
def test_every_preset_shrinks_to_a_model_that_trains(name: str) -> None:
    small = preset(name).shrink()
    torch.manual_seed(0)
    model = build(small.backbone, small.moe).train()
    assert model.num_parameters() < 3e6
    ids = torch.randint(small.backbone["vocab_size"], (2, 24))
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.loss.isfinite()
    assert set(output.aux_losses) == {loss.name for loss in small.moe.balance}
    for block in model.moe_blocks().values():
        gates = [parameter.grad for parameter in block.gate.parameters() if parameter.grad is not None]
        assert any(gate.abs().sum() > 0 for gate in gates)


@pytest.mark.parametrize("name", presets())
def test_the_design_is_kept(name: str) -> None:
    found = preset(name)
    small = found.shrink()
    before, after = found.moe, small.moe

    def mechanism(spec: MoESpec) -> dict[str, Any]:
        return {key: value for key, value in spec.router.to_dict().items() if key not in SIZES}

    assert mechanism(after) == mechanism(before)
    for field in ("activation", "gated", "bias"):
        assert getattr(after.experts, field) == getattr(before.experts, field)
    assert after.capacity == before.capacity
    assert after.selection_bias_update == before.selection_bias_update
    assert [(loss.type, loss.coefficient) for loss in after.balance] == [
        (loss.type, loss.coefficient) for loss in before.balance
    ]
    assert is_dense(small) == is_dense(found)
    assert (after.layers.every, bool(after.layers.first_dense)) == (
        before.layers.every,
        bool(before.layers.first_dense),
    )
    ratio = before.shared_width / before.experts.intermediate_size
    assert after.shared_width / after.experts.intermediate_size == pytest.approx(ratio, rel=0.05)
    heads, backbone = "num_attention_heads", found.backbone
    kv = backbone.get("num_key_value_heads") or backbone[heads]
    assert small.backbone[heads] / (small.backbone.get("num_key_value_heads") or small.backbone[heads]) == (
        backbone[heads] / kv
    )
    assert small.backbone.keys() - SPECIAL_TOKENS == backbone.keys() - SPECIAL_TOKENS


def test_groups_picks_and_devices_follow_the_experts() -> None:
    small = preset("deepseek-v2").shrink()
    router = small.moe.router.to_dict()
    assert (small.moe.experts.num_experts, router["top_k"], router["num_groups"], router["top_k_groups"]) == (
        16,
        4,
        4,
        2,
    )
    assert [loss.to_dict().get("num_devices") for loss in small.moe.balance] == [None, 8, 8]
    assert small.backbone["n_routed_experts"] == 16
    assert (small.backbone["n_group"], small.backbone["topk_group"]) == (4, 2)
    assert small.backbone["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_a_pyramid_stays_one() -> None:
    small = preset("pr-moe-350m").shrink()
    assert small.moe.layers.num_experts == (8, 16)
    assert small.backbone["num_hidden_layers"] == 4


def test_scales_of_attention_follow_the_width_of_a_head() -> None:
    granite, grok = preset("granite-3.0-1b-a400m").shrink(), preset("grok-1").shrink()
    assert granite.backbone["attention_multiplier"] == 1 / 16
    assert grok.backbone["query_pre_attn_scalar"] == grok.backbone["head_dim"] == 8
    assert preset("openmoe-8b").shrink().backbone["attention_multiplier"] == 1.0


def test_few_experts_are_left_as_they_are() -> None:
    small = preset("flexolmo-7x7b").shrink()
    assert (small.moe.experts.num_experts, small.moe.router.to_dict()["top_k"]) == (7, 5)


def test_sizes_can_be_chosen() -> None:
    small = shrink(preset("qwen3-30b-a3b"), max_experts=8, vocabulary_size=300, context_length=64)
    assert small.moe.experts.num_experts == 8
    assert (small.backbone["vocab_size"], small.backbone["max_position_embeddings"]) == (300, 64)


def test_layers_by_index_keep_a_dense_one() -> None:
    found = preset("tiny-fine-grained")
    moe = MoESpec.from_dict({**found.moe.to_dict(), "layers": {"only": [2]}})
    small = found.model_copy(update={"moe": moe}).shrink()
    assert (small.backbone["num_hidden_layers"], small.moe.layers.only) == (2, (1,))


def test_a_router_that_does_not_fit_fewer_experts_is_an_error_of_its_field() -> None:
    found = preset("tiny-olmoe")
    router = {"type": "prototyped", "num_groups": 16}
    moe = MoESpec.from_dict({**found.moe.to_dict(), "router": router, "balance": []})
    with pytest.raises(ConfigError, match=r"moe\.router"):
        found.model_copy(update={"moe": moe}).shrink()
