"""The MLP router: a slow reference for every activation, parameter count, what a linear router can't do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.layer.routers.plain import build, dot, tensor, tokens

from moesaic.errors import ConfigError
from moesaic.layer import MLPConfig, Router, TopKConfig

ACTIVATIONS = {
    "gelu": lambda value: 0.5 * value * (1 + math.erf(value / math.sqrt(2))),
    "relu": lambda value: max(value, 0.0),
    "tanh": math.tanh,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_slow_reference(activation: str, bias: bool) -> None:
    config = MLPConfig.from_dict({"top_k": 2, "hidden_size": 3, "activation": activation, "hidden_bias": bias})
    router, x_TD = build(config, 4, 5), tokens(20, 4)
    routing = router(x_TD)
    parameters: dict[str, Any] = {name: value.tolist() for name, value in router.named_parameters()}
    shift = parameters.get("hidden_bias", [0.0] * 3)
    for token, x in enumerate(x_TD.tolist()):
        hidden = [
            ACTIVATIONS[activation](dot(row, x) + b) for row, b in zip(parameters["hidden_weight"], shift, strict=True)
        ]
        logits = [dot(row, hidden) for row in parameters["weight"]]
        assert routing.logits_TN[token].tolist() == pytest.approx(logits, rel=1e-9, abs=1e-12)


def test_parameter_count_is_the_documented_one() -> None:
    """H (D + N + 1), without bias H (D + N); ModuleFormer, arXiv 2306.04640, has H = 256."""
    for bias in (True, False):
        router = MLPConfig(top_k=2, hidden_bias=bias).build(64, 8)
        assert sum(parameter.numel() for parameter in router.parameters()) == 256 * (64 + 8 + bias)


def test_biases_start_at_zero() -> None:
    router = MLPConfig(top_k=2).build(64, 8)
    assert router.hidden_bias is not None
    assert not router.hidden_bias.any()
    assert router.hidden_weight.std().item() == pytest.approx(0.02, rel=0.1)


def fit(router: Router) -> float:
    """Share of the corners of exclusive or that a trained router gives to the right one of two experts."""
    x_TD, target_T = tensor([[0, 0], [0, 1], [1, 0], [1, 1]]) * 2 - 1, torch.tensor([0, 1, 1, 0])
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(router(x_TD).logits_TN, target_T).backward()
        optimizer.step()
    return (router(x_TD).index_TK[:, 0] == target_T).double().mean().item()


def test_it_learns_boundaries_that_a_linear_router_cannot() -> None:
    torch.manual_seed(0)
    mlp = MLPConfig(top_k=1, hidden_size=16).build(2, 2).double()
    mlp.reset_parameters(std=0.5)
    assert fit(mlp) == 1.0
    assert fit(TopKConfig(top_k=1, linear_bias=True).build(2, 2).double()) < 1.0


def test_bad_configuration_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="hidden_size = 0 is not valid"):
        MLPConfig.from_dict({"top_k": 2, "hidden_size": 0})
    with pytest.raises(ConfigError, match="activation = 'swish' is not one of the choices"):
        MLPConfig.from_dict({"top_k": 2, "activation": "swish"})
