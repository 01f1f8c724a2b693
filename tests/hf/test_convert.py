"""What `convert` and `export` accept, refuse and keep; the numbers are compared in tests/parity."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.stock_models import randomise, stock_config, stock_model, token_ids
from transformers import AutoModel, AutoModelForCausalLM

import moesaic
from moesaic.errors import UnsupportedExport, UnsupportedModel
from moesaic.hf.conversion import spec_from_config
from moesaic.layer import MoESpec

DENSE: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "mistral": {"intermediate_size": 48, "sliding_window": 5},
    "qwen3": {"intermediate_size": 48, "head_dim": 16},
    "granite": {"intermediate_size": 48, "logits_scaling": 3.0, "residual_multiplier": 0.5},
}


def small_spec(**fields: Any) -> MoESpec:
    return MoESpec.from_dict(
        {
            "experts": {"num_experts": 4, "intermediate_size": 24},
            "router": {"top_k": 2, "normalize_top_k": True},
            **fields,
        }
    )


def built(model_type: str, spec: MoESpec, **overrides: Any) -> moesaic.MoesaicForCausalLM:
    config = stock_config(model_type, **{**DENSE.get(model_type, {}), **overrides})
    torch.manual_seed(0)
    return randomise(moesaic.build(config, spec)).eval()


def assert_same_logits(model: torch.nn.Module, stock: torch.nn.Module) -> None:
    ids = token_ids(length=16)
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


# --- reading stock configs


@pytest.mark.parametrize(
    ("model_type", "overrides", "fields"),
    [
        ("mixtral", {}, {"normalize_top_k": True, "softmax_over": "all", "num_groups": None}),
        ("qwen2_moe", {"norm_topk_prob": False}, {"normalize_top_k": False}),
        ("granitemoe", {}, {"softmax_over": "selected"}),
        ("gpt_oss", {}, {"softmax_over": "selected", "linear_bias": True}),
        ("deepseek_v2", {}, {"num_groups": 4, "top_k_groups": 2, "group_score": "max", "scaling_factor": 2.5}),
        ("deepseek_v2", {"norm_topk_prob": True}, {"normalize_top_k": False}),
        (
            "deepseek_v3",
            {},
            {
                "score_function": "sigmoid",
                "selection_bias": True,
                "normalize_top_k": True,
                "normalization_epsilon": 1e-20,
                "group_score": "top2_sum",
                "group_mask_value": "-inf",
            },
        ),
    ],
)
def test_router_of_a_stock_config(model_type: str, overrides: dict[str, Any], fields: dict[str, Any]) -> None:
    router = spec_from_config(stock_config(model_type, **overrides)).router.to_dict()
    assert {name: router[name] for name in fields} == fields


@pytest.mark.parametrize(
    ("model_type", "overrides", "indices"),
    [
        ("qwen3_moe", {}, (0, 1, 2, 3)),
        ("qwen3_moe", {"decoder_sparse_step": 2}, (1, 3)),
        ("qwen2_moe", {"mlp_only_layers": [0, 3]}, (1, 2)),
        ("qwen2_moe", {"mlp_only_layers": [1], "decoder_sparse_step": 2}, (3,)),
        ("glm4_moe", {"first_k_dense_replace": 3}, (3,)),
        ("glm4_moe_lite", {}, (1, 2, 3)),
        ("mellum", {"mlp_layer_types": ["sparse", "dense", "dense", "sparse"]}, (0, 3)),
        ("solar_open", {}, (0, 1, 2, 3)),
    ],
)
def test_moe_layers_are_those_of_the_stock_model(model_type: str, overrides: dict, indices: tuple[int, ...]) -> None:
    config = stock_config(model_type, num_hidden_layers=4, **overrides)
    assert spec_from_config(config).layers.indices(4) == indices
    layers = AutoModel.from_config(config).layers
    assert tuple(index for index, layer in enumerate(layers) if hasattr(layer.mlp, "experts")) == indices


def test_balance_loss_is_read_only_where_the_stock_model_adds_it() -> None:
    assert spec_from_config(stock_config("qwen3_moe", router_aux_loss_coef=0.1)).balance == ()
    assert spec_from_config(stock_config("deepseek_v3", output_router_logits=True)).balance == ()
    config = stock_config(
        "qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0], router_aux_loss_coef=0.1, output_router_logits=True
    )
    (loss,) = spec_from_config(config).balance
    assert (loss.type, loss.scope) == ("load_balancing", "batch")
    assert loss.coefficient == pytest.approx(0.1 * 3 / 3)


# --- convert


@pytest.mark.parametrize(
    ("model_type", "overrides", "words"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise = 0.1", "set it to 0.0"]),
        ("mixtral", {"hidden_act": "tanh"}, ["experts.activation = 'tanh'", "silu"]),
        ("deepseek_v2", {"mlp_bias": True}, ["mlp_bias = True"]),
        ("deepseek_v2", {"num_experts_per_tok": None}, ["num_experts_per_tok = None"]),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, ["topk_method = 'noaux_tc'", "group_limited_greedy"]),
        ("deepseek_v3", {"n_group": None}, ["n_group = None", "to 1 for no groups"]),
        ("deepseek_v3", {"first_k_dense_replace": 3}, ["first_k_dense_replace = 3", "upcycle"]),
        ("qwen2_moe", {"mlp_only_layers": [0, 1]}, ["mlp_only_layers = [0, 1]", "upcycle"]),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, ["shared_expert_intermediate_size = 0"]),
        ("llama", {}, ["'llama'", "mixtral", "upcycle"]),
    ],
)
def test_a_config_that_no_spec_can_say_is_refused(model_type: str, overrides: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UnsupportedModel) as error:
        spec_from_config(stock_config(model_type, **overrides))
    assert all(word in str(error.value) for word in [model_type, *words])


def test_convert_refuses_input_jitter() -> None:
    with pytest.raises(UnsupportedModel, match=r"router_jitter_noise = 0\.1 .* set it to 0\.0"):
        moesaic.convert(stock_model("mixtral", router_jitter_noise=0.1))


def test_convert_refuses_quantised_weights() -> None:
    stock = stock_model("gpt_oss")
    stock.is_quantized = True  # as a quantizer of transformers marks the model
    with pytest.raises(UnsupportedModel, match=r"gpt_oss: the weights are quantised.*dequantize=True"):
        moesaic.convert(stock)


def test_convert_refuses_a_model_without_language_model_head() -> None:
    with pytest.raises(UnsupportedModel, match="MixtralModel is not a MixtralForCausalLM"):
        moesaic.convert(AutoModel.from_config(stock_config("mixtral")))


def test_convert_refuses_one_of_our_models() -> None:
    with pytest.raises(UnsupportedModel, match="moesaic"):
        moesaic.convert(moesaic.convert(stock_model("mixtral")))


def test_converted_weights_are_copies() -> None:
    stock = stock_model("olmoe")
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    model = moesaic.convert(stock)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock.state_dict().items())


def test_selection_bias_stays_float32_when_the_model_is_bfloat16() -> None:
    stock = stock_model("deepseek_v3").bfloat16()
    model = moesaic.convert(stock)
    assert model.dtype == torch.bfloat16
    for block in model.moe_blocks().values():
        assert block.gate.e_score_correction_bias.dtype == torch.float32
    returned = moesaic.export(model)
    assert returned.dtype == torch.bfloat16
    for layer, stock_layer in zip(returned.model.layers[1:], stock.model.layers[1:], strict=True):
        assert torch.equal(layer.mlp.gate.e_score_correction_bias, stock_layer.mlp.gate.e_score_correction_bias.float())


def test_router_logits_are_returned_by_default_where_the_stock_model_does() -> None:
    ids = token_ids()
    for wanted in (False, True):
        stock = stock_model("deepseek_v3", output_router_logits=wanted)
        ours, theirs = moesaic.convert(stock)(ids).router_logits, stock(ids).router_logits
        assert (ours is None) == (theirs is None) == (not wanted)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# --- export of models that were not converted


@pytest.mark.parametrize(("model_type", "stock_type"), [("llama", "mixtral"), ("granite", "granitemoe")])
@pytest.mark.parametrize("router", [{"normalize_top_k": True}, {"softmax_over": "selected"}])
def test_export_of_a_dense_backbone(model_type: str, stock_type: str, router: dict[str, Any]) -> None:
    model = built(model_type, small_spec(router={"top_k": 3, **router}))
    stock = moesaic.export(model)
    assert stock.config.model_type == stock_type
    assert_same_logits(model, stock)


def test_export_keeps_mistrals_sliding_window() -> None:
    model = built("mistral", small_spec())
    stock = moesaic.export(model)
    assert (stock.config.model_type, stock.config.sliding_window) == ("mixtral", 5)
    assert_same_logits(model, stock)


def test_export_of_qwen3_keeps_dense_layers() -> None:
    model = built("qwen3", small_spec(layers={"first_dense": 1}, router={"top_k": 2}), num_hidden_layers=3)
    stock = moesaic.export(model)
    assert (stock.config.model_type, stock.config.mlp_only_layers, stock.config.head_dim) == ("qwen3_moe", [0], 16)
    assert_same_logits(model, stock)


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        *((name, {}) for name in DENSE),
        (
            "llama",
            {
                "head_dim": 16,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            },
        ),
        ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ],
)
def test_exported_upcycled_model_loads_from_disk(model_type: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    config = stock_config(model_type, **{**DENSE[model_type], **overrides})
    dense = randomise(AutoModelForCausalLM.from_config(config)).eval()
    spec = small_spec(experts={"num_experts": 4, "intermediate_size": 48})
    moesaic.export(moesaic.upcycle(dense, spec)).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert type(loaded).__name__ in {"MixtralForCausalLM", "Qwen3MoeForCausalLM", "GraniteMoeForCausalLM"}
    assert_same_logits(dense, loaded)


@pytest.mark.parametrize(
    ("model_type", "overrides", "spec"),
    [
        ("qwen3_moe", {}, small_spec(layers={"only": (0, 1)}, router={"top_k": 1})),
        ("olmoe", {}, small_spec(experts={"num_experts": 4, "intermediate_size": 24, "activation": "gelu"})),
        ("mixtral", {"router_jitter_noise": 0.1}, small_spec()),
        ("qwen2_moe", {}, small_spec(shared_experts={"intermediate_size": 40, "sigmoid_gate": True})),
        (
            "deepseek_v2",
            {"first_k_dense_replace": 2},
            small_spec(router={"top_k": 2, "scaling_factor": 3.0}, shared_experts={"num_experts": 3}),
        ),
        ("mellum", {}, small_spec(layers={"only": (0, 1)}, router={"top_k": 1})),
        (
            "exaone_moe",
            {},
            small_spec(
                experts={"num_experts": 6, "intermediate_size": 24},
                shared_experts={"num_experts": 1, "intermediate_size": 72},
                router={"top_k": 2, "score_function": "sigmoid", "selection_bias": True, "scaling_factor": 3.0},
            ),
        ),
        (
            "hunyuan_v1_moe",
            {},
            small_spec(experts={"num_experts": 4, "intermediate_size": 24}, shared_experts={"num_experts": 1}),
        ),
        (
            "solar_open",
            {},
            small_spec(
                shared_experts={"num_experts": 3},
                router={"top_k": 2, "score_function": "sigmoid", "selection_bias": True},
            ),
        ),
        (
            "deepseek_v3",
            {},
            small_spec(
                experts={"num_experts": 6, "intermediate_size": 24},
                layers={"first_dense": 1},
                shared_experts={"num_experts": 1, "intermediate_size": 48},
                router={
                    "top_k": 2,
                    "score_function": "sigmoid",
                    "selection_bias": True,
                    "num_groups": 3,
                    "top_k_groups": 2,
                    "group_score": "top2_sum",
                },
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_export_says_the_spec_in_the_stock_config(model_type: str, overrides: dict[str, Any], spec: MoESpec) -> None:
    model = built(model_type, spec, **overrides)
    stock = moesaic.export(model)
    assert stock.config.model_type == model_type
    assert_same_logits(model, stock)


@pytest.mark.parametrize(
    ("model_type", "overrides", "fields", "words"),
    [
        ("llama", {}, {"router": {"top_k": 2}}, "moe.router.normalize_top_k = False"),
        ("llama", {}, {"dropout": 0.1}, "moe.dropout = 0.1"),
        ("llama", {}, {"layers": {"first_dense": 1}}, "moe.layers = (1,)"),
        ("llama", {}, {"shared_experts": {}}, "moe.shared_experts width = 24"),
        ("llama", {}, {"router": {"top_k": 2, "score_function": "sigmoid"}}, "moe.router.score_function = 'sigmoid'"),
        ("llama", {}, {"router": {"top_k": 2, "num_groups": 2, "top_k_groups": 1}}, "moe.router.num_groups = 2"),
        ("llama", {}, {"router": {"top_k": 2, "scaling_factor": 2.0}}, "moe.router.scaling_factor = 2.0"),
        ("llama", {"attention_bias": True}, {}, "backbone.attention_bias = True"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, {}, "backbone.layer_types"),
        ("gpt_oss", {}, {}, "moe.experts.activation = 'silu'"),
        ("mixtral", {}, {"layers": {"first_dense": 1}}, "moe.layers: layers [0] hold MoE blocks"),
        ("gemma2", {"intermediate_size": 48, "head_dim": 8}, {}, "backbone.model_type = 'gemma2'"),
    ],
)
def test_export_refuses_with_the_field(model_type: str, overrides: dict, fields: dict, words: str) -> None:
    model = built(model_type, small_spec(**fields), **overrides)
    with pytest.raises(UnsupportedExport) as error:
        moesaic.export(model)
    assert words in str(error.value)


def test_export_warns_about_balance_losses_it_drops(caplog: pytest.LogCaptureFixture) -> None:
    losses = [{"type": "load_balancing", "coefficient": 0.01}, {"type": "z_loss", "coefficient": 0.001}]
    model = built("llama", small_spec(balance=losses))
    with caplog.at_level(logging.WARNING, logger="moesaic"):
        stock = moesaic.export(model)
    assert stock.config.output_router_logits is False
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "load_balancing" in messages[0]
    assert "router_aux_loss_coef=0.01 " in messages[0]  # 0.01 * 2 layers / 2 picks
    assert "z_loss" in messages[1]


def test_export_keeps_the_balance_loss_it_came_with(caplog: pytest.LogCaptureFixture) -> None:
    stock = stock_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.03)
    with caplog.at_level(logging.WARNING, logger="moesaic"):
        config = moesaic.export(moesaic.convert(stock)).config
    assert (config.output_router_logits, config.router_aux_loss_coef) == (True, 0.03)
    assert not caplog.records
