"""The dense-to-sparse gate: the formula with its noise, the schedule, from all experts to few, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import DenseToSparseConfig, DenseToSparseRouter, LayerLoad, RoutingContext
from moesaic.layer.noise import gumbel

N, D, T = 6, 4, 200
CONTEXT = RoutingContext(seed=torch.tensor(3))


def make_router(training: bool = True, **fields: Any) -> DenseToSparseRouter:
    router = DenseToSparseConfig.from_dict(fields).build(D, N).double().train(training)
    router.weight.data.copy_(torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return router


def tokens(count: int = T) -> Tensor:
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(router: DenseToSparseRouter, progress: float) -> None:
    router.post_step(LayerLoad.of(router(tokens(), CONTEXT)), progress)


@pytest.mark.parametrize("training", [True, False])
def test_weights_are_the_gumbel_softmax_above_the_threshold(training: bool) -> None:
    router, x_TD = make_router(training, temperature=0.5, threshold=0.1), tokens()
    routing = router(x_TD, CONTEXT)
    noise_TN = gumbel(CONTEXT, router.layer, (T, N), stream=0, like=x_TD) if training else torch.zeros(T, N)
    for token in range(T):
        gate_N = ((router.weight @ x_TD[token] + noise_TN[token]) / 0.5).softmax(0)
        kept = [expert for expert in range(N) if gate_N[expert] >= 0.1]
        assert [expert for expert in routing.index_TK[token].tolist() if expert != N] == kept
        weights = [gate_N[expert].item() if expert in kept else 0.0 for expert in range(N)]
        assert routing.weight_TK[token].tolist() == pytest.approx(weights)
    torch.testing.assert_close(routing.scores_TN, (x_TD @ router.weight.T / 0.5).softmax(-1))


def test_temperature_follows_the_schedule_after_each_step() -> None:
    router = make_router(temperature={"start": 4.0, "end": 0.25, "shape": "exponential"})
    assert router.temperature.item() == 4.0
    for progress, expected in ((0.5, 1.0), (0.75, 0.5), (1.0, 0.25)):
        step(router, progress)
        assert router.temperature.item() == pytest.approx(expected)
    assert router.bfloat16().temperature.dtype == torch.float32


def test_all_experts_run_at_first_and_few_at_last() -> None:
    router = make_router(temperature={"start": 5.0, "end": 0.05, "shape": "exponential"})
    shares = []
    for progress in (0.0, 0.5, 1.0):
        step(router, progress)
        shares.append((router(tokens(), CONTEXT).index_TK < N).double().sum(-1).mean().item())
    assert shares[0] > 0.95 * N > shares[1] > shares[2]
    assert shares[2] < 1.5


def test_one_expert_always_stays() -> None:
    """Also where all logits are equal, since the threshold is below 1 / N."""
    router = make_router(training=False, threshold=0.999 / N)
    assert (router(torch.zeros(3, D, dtype=torch.float64)).index_TK < N).all()
    assert ((router(tokens()).index_TK < N).sum(-1) >= 1).all()


def test_noise_is_gumbel_of_the_logits() -> None:
    """At a low temperature the noisy argmax is a draw from the softmax of the logits."""
    router = make_router(temperature=0.001)
    x_D = tokens(1)[0]
    routing = router(x_D.expand(20000, D), CONTEXT)
    share_N = routing.index_TK.flatten().bincount(minlength=N + 1)[:N] / 20000
    torch.testing.assert_close(share_N.double(), (router.weight @ x_D).softmax(0).detach(), atol=0.015, rtol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    router = make_router(threshold=0.02)
    assert torch.autograd.gradcheck(lambda x_TD: router(x_TD, CONTEXT).weight_TK, tokens(8).requires_grad_())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": 0.2}, r"threshold = 0.2 could drop all 6 experts; choose less than 1/6"),
        ({"temperature": 0}, r"temperature = 0.* divides the logits"),
        ({"temperature": {"start": 1.0, "end": 0.0}}, r"temperature = 0.* divides the logits"),
        ({"temperature": -1}, r"temperature"),
    ],
)
def test_bad_config_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_router(**fields)
