"""Packed experts: names and shapes of parameters, activations, splitting, refusals."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moesaic.errors import ConfigError
from moesaic.layer import Experts, ExpertsConfig
from moesaic.layer.activations import ACTIVATIONS

N, D, WIDTH = 4, 6, 8

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "gated": ({}, {"gate_up_proj": (N, 2 * WIDTH, D), "down_proj": (N, D, WIDTH)}),
    "plain": (
        {"gated": False, "activation": "relu2"},
        {"up_proj": (N, WIDTH, D), "down_proj": (N, D, WIDTH)},
    ),
    "gated_biased": (
        {"bias": True},
        {
            "gate_up_proj": (N, 2 * WIDTH, D),
            "gate_up_proj_bias": (N, 2 * WIDTH),
            "down_proj": (N, D, WIDTH),
            "down_proj_bias": (N, D),
        },
    ),
    "plain_biased": (
        {"gated": False, "bias": True, "activation": "gelu_new"},
        {"up_proj": (N, WIDTH, D), "up_proj_bias": (N, WIDTH), "down_proj": (N, D, WIDTH), "down_proj_bias": (N, D)},
    ),
    "doubly_gated": (
        {"activation": "swiglu_double"},
        {"gate_up_proj": (N, 3 * WIDTH, D), "down_proj": (N, D, WIDTH)},
    ),
    "doubly_gated_biased": (
        {"activation": "swiglu_double", "bias": True},
        {
            "gate_up_proj": (N, 3 * WIDTH, D),
            "gate_up_proj_bias": (N, 3 * WIDTH),
            "down_proj": (N, D, WIDTH),
            "down_proj_bias": (N, D),
        },
    ),
    "gpt_oss": (
        {"bias": True, "activation": "clamped_swiglu", "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        {
            "gate_up_proj": (N, 2 * WIDTH, D),
            "gate_up_proj_bias": (N, 2 * WIDTH),
            "down_proj": (N, D, WIDTH),
            "down_proj_bias": (N, D),
        },
    ),
}


def make_experts(**fields: Any) -> Experts:
    torch.manual_seed(0)
    experts = Experts(ExpertsConfig.from_dict({"num_experts": N, "intermediate_size": WIDTH, **fields}), D).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_are_named_and_shaped_as_documented(layout: str) -> None:
    fields, expected = LAYOUTS[layout]
    experts = make_experts(**fields)
    assert {name: tuple(tensor.shape) for name, tensor in experts.state_dict().items()} == expected
    assert experts.has_gate == ("gate_up_proj" in expected)
    assert experts.has_bias == ("down_proj_bias" in expected)
    assert (experts.is_transposed, experts.is_concatenated) == (False, True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_agree_on_every_layout(layout: str) -> None:
    fields, _ = LAYOUTS[layout]
    x_TD = torch.randn(7, D, dtype=torch.float64)
    index_TK = torch.randint(N + 1, (7, 2))
    weight_TK = torch.rand(7, 2, dtype=torch.float64)
    outputs = [make_experts(**fields, kernel=kernel)(x_TD, index_TK, weight_TK) for kernel in ("auto", "loop")]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_hf_configs(name: str) -> None:
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), rtol=1e-12, atol=1e-12)


def test_stock_weights_load_by_name_and_give_the_stock_output() -> None:
    config = MixtralConfig(hidden_size=D, intermediate_size=WIDTH, num_local_experts=N, num_attention_heads=2)
    config._experts_implementation = "eager"
    experts, stock = make_experts(), MixtralExperts(config).double()
    stock.load_state_dict(experts.state_dict())
    x_TD, index_TK = torch.randn(7, D, dtype=torch.float64), torch.randint(N, (7, 2))
    weight_TK = torch.rand(7, 2, dtype=torch.float64)
    torch.testing.assert_close(experts(x_TD, index_TK, weight_TK), stock(x_TD, index_TK, weight_TK))


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_slices_of_a_network_all_picked_equal_the_uncut_network(weight: float) -> None:
    """Fine-grained experts: m slices of 1/m width, each with weight g, are g times the whole (arXiv 2401.06066)."""
    slices, x_TD = make_experts(), torch.randn(7, D, dtype=torch.float64)
    gate_NFD, up_NFD = slices.get_parameter("gate_up_proj").chunk(2, dim=1)
    down_DF = slices.down_proj.transpose(0, 1).flatten(1)
    whole_TD = (nn.functional.silu(x_TD @ gate_NFD.flatten(0, 1).T) * (x_TD @ up_NFD.flatten(0, 1).T)) @ down_DF.T
    every_TK = torch.arange(N).expand(7, N)
    actual_TD = slices(x_TD, every_TK, torch.full((7, N), weight, dtype=torch.float64))
    torch.testing.assert_close(actual_TD, weight * whole_TD, rtol=1e-12, atol=1e-12)


def test_initialisation_has_the_asked_spread_and_zero_biases() -> None:
    experts = Experts(ExpertsConfig(num_experts=8, intermediate_size=64, bias=True), 64)
    experts.reset_parameters(std=0.006)
    assert experts.down_proj.std().item() == pytest.approx(0.006, rel=0.05)
    assert experts.get_parameter("gate_up_proj").std().item() == pytest.approx(0.006, rel=0.05)
    assert not experts.get_parameter("gate_up_proj_bias").any()
    assert not experts.down_proj_bias.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deep_copies_and_pickles(layout: str) -> None:
    experts = make_experts(**LAYOUTS[layout][0])
    buffer = io.BytesIO()
    torch.save(experts, buffer)
    buffer.seek(0)
    x_TD, index_TK = torch.randn(3, D, dtype=torch.float64), torch.tensor([[0], [3], [N]])
    weight_TK = torch.ones(3, 1, dtype=torch.float64)
    expected_TD = experts(x_TD, index_TK, weight_TK)
    clone, loaded = copy.deepcopy(experts), torch.load(buffer, weights_only=False)
    experts.down_proj.data.zero_()
    assert torch.equal(clone(x_TD, index_TK, weight_TK), expected_TD)
    assert torch.equal(loaded(x_TD, index_TK, weight_TK), expected_TD)


def test_repr_says_what_it_is() -> None:
    assert "num_experts=4, intermediate_size=8, kernel=loop" in repr(make_experts(kernel="loop"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 0}, r"num_experts = 0 is not valid; input should be greater than 0"),
        ({"intermediate_size": -2}, r"intermediate_size = -2 is not valid"),
        ({"activation": "tanh"}, r"activation = 'tanh' is not one of the choices; choose one of 'silu'"),
        ({"kernel": "fast"}, r"kernel = 'fast' is not one of the choices; choose one of 'auto', .*'grouped', 'loop'"),
        (
            {"activation": "clamped_swiglu", "gated": False, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
            r"gated = False does not go with clamped_swiglu; set gated: true",
        ),
        (
            {"activation": "clamped_swiglu", "swiglu_limit": 7.0},
            r"swiglu_alpha = None is required by clamped_swiglu; gpt-oss uses 1.702 and 7.0",
        ),
        (
            {"activation": "swiglu_double", "gated": False},
            r"gated = False does not go with swiglu_double; set gated: true",
        ),
        ({"swiglu_limit": 7.0}, r"swiglu_limit = 7.0 is not used by activation silu; remove it"),
        (
            {"activation": "clamped_swiglu", "swiglu_alpha": 1.702, "swiglu_limit": 0},
            r"swiglu_limit = 0 is not valid; input should be greater than 0",
        ),
    ],
)
def test_bad_configuration_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        ExpertsConfig.from_dict({"num_experts": N, "intermediate_size": WIDTH, **fields})
