"""Coefficients of other libraries on our scale, against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moesaic.layer import LoadBalancing, RoutingContext, TopKConfig
from moesaic.layer.balance import BalanceObjective
from moesaic.layer.balance.conversions import (
    OverLayers,
    from_megatron,
    from_transformers,
    from_undivided,
    to_megatron,
    to_transformers,
    to_undivided,
)

N, K, LAYERS, T = 6, 2, 3, 40


def layer_logits(*, same: bool) -> list[Tensor]:
    """Logits of each layer, all the same or not."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(T, N, dtype=torch.float64, generator=generator)
    others = [torch.randn(T, N, dtype=torch.float64, generator=generator) for _ in range(LAYERS - 1)]
    return [logits.clone().requires_grad_() for logits in [first, *([first] * len(others) if same else others)]]


def ours(logits: list[Tensor], coefficient: float) -> Tensor:
    """What our model adds to its loss."""
    router = TopKConfig(top_k=K).build(N, N).double()
    router.weight.data.copy_(torch.eye(N))
    context = RoutingContext(records={layer: router(logits_TN) for layer, logits_TN in enumerate(logits)})
    objective = BalanceObjective([LoadBalancing(coefficient=coefficient)], torch.ones(1, dtype=torch.float64))
    return objective.by_name(context)["load_balancing"]


def megatron(logits: list[Tensor], coefficient: float, over_layers: OverLayers) -> Tensor:
    """Megatron-Core's `switch_load_balancing_loss_func` line by line; MegaBlocks divides by the number of layers, too."""
    total = torch.zeros((), dtype=torch.float64)
    for logits_TN in logits:
        probs = logits_TN.softmax(-1)
        indices = probs.topk(K, dim=-1).indices
        tokens_per_expert = torch.zeros_like(probs).scatter(1, indices, 1.0).sum(0)
        aggregated_probs_per_expert = probs.sum(0)
        total = total + (aggregated_probs_per_expert * tokens_per_expert).sum() * (N * coefficient / (K * T * T))
    return total if over_layers == "sum" else total / LAYERS


def gradients(loss: Tensor, logits: list[Tensor]) -> Any:
    return torch.autograd.grad(loss, logits)


def test_transformers() -> None:
    logits = layer_logits(same=True)
    theirs = 0.02 * load_balancing_loss_func(tuple(logits), num_experts=N, top_k=K)
    mine = ours(logits, from_transformers(0.02, K, LAYERS))
    torch.testing.assert_close(theirs.double(), mine, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(theirs, logits), gradients(mine, logits), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("over_layers", ["sum", "mean"])
def test_megatron(over_layers: OverLayers) -> None:
    logits = layer_logits(same=False)
    theirs = megatron(logits, 0.01, over_layers)
    mine = ours(logits, from_megatron(0.01, LAYERS, over_layers))
    torch.testing.assert_close(theirs, mine)
    torch.testing.assert_close(gradients(theirs, logits), gradients(mine, logits))


def test_undivided() -> None:
    logits = layer_logits(same=False)
    theirs = torch.zeros((), dtype=torch.float64)
    for logits_TN in logits:
        probs = logits_TN.softmax(-1)
        f_N = torch.zeros_like(probs).scatter(1, probs.topk(K, dim=-1).indices, 1.0).mean(0)
        theirs = theirs + 0.02 * N * (f_N * probs.mean(0)).sum()
    torch.testing.assert_close(theirs, ours(logits, from_undivided(0.02, K)))


def test_there_and_back() -> None:
    assert to_transformers(from_transformers(0.3, 4, 7), 4, 7) == pytest.approx(0.3)
    assert to_undivided(from_undivided(0.3, 4), 4) == pytest.approx(0.3)
    for over_layers in ("sum", "mean"):
        assert to_megatron(from_megatron(0.3, 7, over_layers), 7, over_layers) == pytest.approx(0.3)
