"""Plain-Python pieces of the slow references, and routers with known parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from moesaic.layer import BaseRouterConfig, Router

# A grid of halves ties often, and unequal values stay further apart than float64 rounds.
GRID = st.integers(-6, 6).map(lambda step: step / 2)


def tensor(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def build(config: BaseRouterConfig, hidden_size: int, num_experts: int, *, training: bool = False) -> Router:
    """A float64 router whose parameters all hold values that matter."""
    router = config.build(hidden_size, num_experts).double().train(training)
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return router


def identity(config: BaseRouterConfig, num_experts: int, *, training: bool = False) -> Router:
    """A router of `num_experts` inputs whose `weight` is the identity: a token is its own logits."""
    router = config.build(num_experts, num_experts).double().train(training)
    with torch.no_grad():
        router.get_parameter("weight").copy_(torch.eye(num_experts))
    return router


def tokens(count: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax(values: Sequence[float]) -> list[float]:
    exponentials = [math.exp(value - max(values)) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def best(values: Sequence[float], k: int) -> list[int]:
    """Positions of the k largest, ties to the lower."""
    return sorted(range(len(values)), key=lambda index: -values[index])[:k]


def dot(one: Sequence[float], two: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, two, strict=True))


def by_expert(router_output: Any, token: int, num_experts: int) -> list[float]:
    """Weight of each expert for a token, 0 for those not picked."""
    weights = [0.0] * num_experts
    picks = zip(router_output.index_TK[token].tolist(), router_output.weight_TK[token].tolist(), strict=True)
    for expert, weight in picks:
        if expert < num_experts:
            weights[expert] += weight
    return weights
