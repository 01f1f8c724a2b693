from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from tests.trace.models import NUM_EXPERTS, TOP_K, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import moesaic
from moesaic.errors import ConfigError, UnsupportedModel
from moesaic.trace import account


def test_the_deepseekmoe_16b_configuration():
    """arXiv 2401.06066, tables 2 and 4: 16.4B parameters, 2.8B active; 74.4T FLOPs printed for 4K tokens."""
    backbone = {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "vocab_size": 102400,
    }
    moe = {
        "experts": {"num_experts": 64, "intermediate_size": 1408},
        "router": {"top_k": 6},
        "shared_experts": {"num_experts": 2},
        "layers": {"first_dense": 1},
    }
    with torch.device("meta"):
        model = moesaic.build(backbone, moe)
    accounting = account(model, context_length=4096)
    assert accounting.total == sum(p.numel() for p in model.parameters()) == 16_375_728_128
    small = sum(accounting.parts[name].active for name in ("router", "norms"))
    assert accounting.active - small == 2_824_994_816
    assert (
        accounting.parts["routed experts"].total + accounting.parts["shared experts"].total == 66 * 27 * 3 * 2048 * 1408
    )
    assert accounting.parts["attention"].total == 28 * 4 * 2048**2
    assert accounting.parts["dense FFN"].total == 3 * 2048 * 10944
    router = 27 * 64 * 2048
    training = 3 * 4096 * (accounting.flops_per_token() - 2 * router)
    assert training == pytest.approx(75.8e12, rel=1e-3)
    assert [plan.kind for plan in accounting.layers] == ["dense"] + ["moe"] * 27
    assert [layers for layers, _ in accounting.layer_groups()] == ["0", "1-27"]
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(("networks", "teraflops"), [(1, 2.88), (2, 4.33), (3, 5.78), (16, 24.63)])
def test_the_training_flops_of_the_2b_validation_models(networks: int, teraflops: float):
    """arXiv 2401.06066, tables 1 and 2: FLOPs for 2K tokens, forward and backward, by the active feed-forward networks.

    A network has 8 h^2 parameters, four experts of the width h; one of all active experts is shared.
    """
    backbone = {
        "model_type": "llama",
        "hidden_size": 1280,
        "num_hidden_layers": 9,
        "num_attention_heads": 10,
        "vocab_size": 8192,
    }
    moe = {
        "experts": {"num_experts": 63, "intermediate_size": 1280, "gated": False},
        "router": {"top_k": 4 * networks - 1},
        "shared_experts": {"num_experts": 1},
    }
    with torch.device("meta"):
        accounting = account(moesaic.build(backbone, moe), context_length=2048)
    assert 3 * 2048 * accounting.flops_per_token() == pytest.approx(teraflops * 1e12, rel=5e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_parts_add_up_and_tied_weights_count_once(tied: bool):
    model = tiny_model({"tie_word_embeddings": tied})
    accounting = account(model)
    assert accounting.total == sum(p.numel() for p in model.parameters())
    assert ("output head" in accounting.parts) is not tied
    assert "other" not in accounting.parts
    # The head's product is computed whether or not its weights are shared.
    assert accounting.matmul_parameters == account(tiny_model()).matmul_parameters


def test_active_experts_are_the_picked_share():
    accounting = account(tiny_model(experts={"num_experts": NUM_EXPERTS, "intermediate_size": 16, "bias": True}))
    routed = accounting.parts["routed experts"]
    assert routed.active * NUM_EXPERTS == routed.total * TOP_K
    for name in ("attention", "shared experts", "dense FFN", "norms", "router"):
        assert accounting.parts[name].active == accounting.parts[name].total
    outside = ("embeddings", "output head", "norms")
    in_layers = sum(plan.parameters.total for plan in accounting.layers)
    final_norm = 32
    layer_norms = accounting.parts["norms"].total - final_norm
    assert in_layers == accounting.total - sum(accounting.parts[name].total for name in outside) + layer_norms


@pytest.mark.parametrize(
    ("router", "stored", "active", "multiplied"),
    [
        # Rows of the table of ids, and the experts' two vectors.
        (
            {"type": "stable", "vocabulary_size": 100, "width": 5},
            100 * 5 + 8 * (5 + 16),
            5 + 8 * (5 + 16),
            8 * (5 + 16),
        ),
        # A gate for each task, of which a token has one.
        ({"type": "task", "num_tasks": 3, "top_k": 2}, 3 * 8 * 16, 8 * 16, 8 * 16),
        ({"type": "task", "num_tasks": 3, "top_k": 2, "kind": "embedding"}, 3 * 16 + 8 * 16, 16 + 8 * 16, 8 * 16),
    ],
    ids=["stable", "task gates", "task embedding"],
)
def test_rows_that_a_router_looks_up_are_no_product(router: dict, stored: int, active: int, multiplied: int):
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_experts": 8, "intermediate_size": 4}

    def counted(router: dict):
        with torch.device("meta"):
            model = moesaic.build(
                {"model_type": "llama", "vocab_size": 100, **sizes}, {"experts": experts, "router": router}
            )
        return account(model)

    found, plain = counted(router), counted({"type": "top_k", "top_k": 1 if router["type"] == "stable" else 2})
    assert (found.parts["router"].total, found.parts["router"].active) == (stored, active)
    assert found.matmul_parameters - plain.matmul_parameters == multiplied - 8 * 16


def test_flops_are_two_per_matrix_parameter_plus_attention():
    accounting = account(tiny_model(), context_length=100)
    attention = 2 * 32 * 32 + 2 * 32 * 16
    expert, dense, head, router = 3 * 32 * 16, 3 * 32 * 48, 32 * 50, 32 * NUM_EXPERTS
    matrices = 3 * attention + dense + head + 2 * (router + (TOP_K + 1) * expert)
    assert accounting.flops_per_token() == 2 * matrices + 4 * 3 * 100 * 32
    assert accounting.flops_per_token(200) - accounting.flops_per_token(100) == 4 * 3 * 100 * 32


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3", "gemma2"])
def test_dense_models_of_other_families(model_type: str):
    names = {"gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2}}
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(model_type, vocab_size=50, **names.get(model_type, common))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    accounting = account(model)
    assert accounting.total == accounting.active == sum(p.numel() for p in model.parameters())
    assert "other" not in accounting.parts
    assert [plan.kind for plan in accounting.layers] == ["dense", "dense"]


def test_latent_attention_has_its_own_widths():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 12, "v_head_dim": 10}
    config = AutoConfig.for_model("deepseek_v3", vocab_size=50, first_k_dense_replace=2, **sizes, **heads)
    with torch.device("meta"):
        accounting = account(AutoModelForCausalLM.from_config(config))
    assert accounting.attention_width == 2 * 2 * (12 + 4 + 10)


def test_stock_experts_and_unknown_modules_are_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", vocab_size=50, **sizes))
    with pytest.raises(UnsupportedModel, match=r"MixtralForCausalLM .*moesaic\.convert"):
        account(stock)
    with pytest.raises(UnsupportedModel, match="holds no transformers model"):
        account(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="context_length = 0"):
        account(tiny_model(), context_length=0)


def test_it_renders_to_a_table_and_to_json():
    accounting = account(tiny_model())
    console = Console(file=io.StringIO(), width=160)
    console.print(accounting)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{accounting.total:,}" in text
    assert "routed experts" in text
    values = json.loads(json.dumps(accounting.to_dict()))
    assert values["parameters"] == {"total": accounting.total, "active": accounting.active}
    assert values["layers"][1]["num_experts"] == NUM_EXPERTS
    assert sum(part["total"] for part in values["parts"].values()) == accounting.total
