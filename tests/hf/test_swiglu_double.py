"""Models with OpenMoE's double gate, in experts, fixed networks and dense layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.hf.test_generation import GREEDY, greedy
from tests.hf.test_stored import check
from tests.hf.tiny import EXPERT_SIZE, NUM_EXPERTS, dense_model, gradients, tiny_model, token_ids
from torch import nn

import moesaic
from moesaic import MoesaicForCausalLM, MoESpec
from moesaic.errors import ConfigError, UnsupportedExport
from moesaic.layer import FeedForward
from moesaic.trace import account
from moesaic.transform import copy_spec

EXPERTS: dict[str, Any] = {"num_experts": NUM_EXPERTS, "intermediate_size": EXPERT_SIZE, "activation": "swiglu_double"}
OPENMOE: dict[str, Any] = {
    "experts": EXPERTS,
    "shared_experts": {"intermediate_size": 20, "placement": "after"},
    "dense_layers": {"intermediate_size": 40, "activation": "swiglu_double"},
}


@pytest.fixture(scope="module")
def openmoe() -> MoesaicForCausalLM:
    return tiny_model(**OPENMOE)


def test_it_learns_and_decodes(openmoe: MoesaicForCausalLM) -> None:
    ids = token_ids(2, 9)
    openmoe(ids, labels=ids).loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(openmoe).values())
    openmoe.zero_grad()
    assert torch.equal(openmoe.generate(ids, **GREEDY), greedy(openmoe, ids))


def test_experts_are_stored_one_by_one(openmoe: MoesaicForCausalLM, tmp_path: Path) -> None:
    openmoe.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    packed_NHD = openmoe.moe_blocks()[1].experts.get_parameter("gate_up_proj")
    for expert in range(NUM_EXPERTS):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        parts = [tensors[f"{prefix}.{name}.weight"] for name in ("gate_linear_proj", "gate_proj", "up_proj")]
        assert torch.equal(torch.cat(parts), packed_NHD[expert])
    assert "model.layers.1.mlp.shared_experts.gate_linear_proj.weight" in tensors
    assert "model.layers.0.mlp.gate_linear_proj.weight" in tensors
    loaded, report = MoesaicForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded(token_ids()).logits, openmoe(token_ids()).logits)


def test_sharded_checkpoints_know_its_tensors(openmoe: MoesaicForCausalLM, tmp_path: Path) -> None:
    check(openmoe, tmp_path)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_implementations_of_transformers(openmoe: MoesaicForCausalLM, implementation: str) -> None:
    expected = openmoe(token_ids()).logits
    try:
        openmoe.set_experts_implementation(implementation)
        torch.testing.assert_close(openmoe(token_ids()).logits, expected, rtol=1e-4, atol=1e-4)
    finally:
        openmoe.set_experts_implementation("moesaic")


def test_every_network_has_four_matrices(openmoe: MoesaicForCausalLM) -> None:
    found = account(openmoe).parts
    assert found["routed experts"].total == 2 * NUM_EXPERTS * 4 * 32 * EXPERT_SIZE
    assert found["shared experts"].total == 2 * 4 * 32 * 20
    assert found["dense FFN"].total == 4 * 32 * 40
    assert found["routed experts"].active == found["routed experts"].total * 2 // NUM_EXPERTS


def test_dense_layers_are_replaced_and_moe_layers_are_not() -> None:
    model = tiny_model(dense_layers={"intermediate_size": 20, "activation": "gelu", "gated": False, "bias": True})
    layer: Any = model.model.backbone.get_submodule("layers.0.mlp")
    assert type(layer) is FeedForward
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), layer.down_proj(nn.functional.gelu(layer.up_proj(x))))
    fresh = moesaic.build(model.config.get_text_config(), model.config.spec)
    assert 0.015 < fresh.get_parameter("model.backbone.layers.0.mlp.up_proj.weight").std().item() < 0.025


def test_export_names_what_stock_families_lack() -> None:
    model = tiny_model("qwen3", experts=EXPERTS, layers={})
    with pytest.raises(UnsupportedExport, match=r"experts.activation = 'swiglu_double' \(there it is 'silu'\)"):
        moesaic.export(model)
    model = tiny_model("qwen3", {"mlp_only_layers": [0]}, dense_layers={"intermediate_size": 8})
    with pytest.raises(UnsupportedExport, match="dense_layers"):
        moesaic.export(model)


def test_upcycling_refuses_what_a_dense_model_has_not() -> None:
    dense = dense_model("llama")
    spec = copy_spec(dense, num_experts=4, top_k=2).to_dict()
    with pytest.raises(ConfigError, match=r"moe.experts.activation = 'swiglu_double' differs"):
        moesaic.upcycle(dense, {**spec, "experts": {**spec["experts"], "activation": "swiglu_double"}})
    with pytest.raises(ConfigError, match=r"moe.dense_layers"):
        moesaic.upcycle(dense, {**spec, "layers": {"first_dense": 1}, "dense_layers": {"intermediate_size": 8}})


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_upcycling_with_a_network_behind_the_layer_keeps_logits(model_type: str) -> None:
    dense, ids = dense_model(model_type), token_ids()
    spec = copy_spec(dense, num_experts=4, top_k=2).to_dict()
    model = moesaic.upcycle(dense, {**spec, "shared_experts": {"placement": "after"}})
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=3e-5)
    for block in model.moe_blocks().values():
        assert block.shared_norm is not None
        assert not torch.equal(block.shared_norm.get_parameter("weight"), torch.ones(32))


def test_dense_layers_that_there_are_none_of_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"moe.dense_layers = .* is used by no layer"):
        tiny_model(layers={}, dense_layers={"intermediate_size": 8})


def test_stock_blocks_that_return_a_tuple_leave_no_room_for_dense_layers() -> None:
    experts = {"num_experts": 4, "intermediate_size": 8}
    spec = MoESpec.from_dict(
        {"experts": experts, "router": {"top_k": 2}, "layers": {"only": [0]}, "dense_layers": {"intermediate_size": 8}}
    )
    with pytest.raises(ConfigError, match=r"moe\.dense_layers"):
        moesaic.build({"model_type": "gpt_oss", "num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 64}, spec)
