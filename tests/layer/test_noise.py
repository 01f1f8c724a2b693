"""Random numbers from a seed: reproducible, independent over layers, streams and seeds, with the right distribution."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.layer import RoutingContext
from moesaic.layer.noise import gumbel, normal, uniform

LIKE = torch.zeros((), dtype=torch.float64)


def context(seed: int = 3) -> RoutingContext:
    return RoutingContext(seed=torch.tensor(seed))


@pytest.mark.parametrize("layer", [0, 1, 2, 63, 1000])
def test_numbers_of_any_layer_repeat_and_differ_from_others(layer: int) -> None:
    drawn = uniform(context(), layer, (50,), stream=0, like=LIKE)
    assert torch.equal(drawn, uniform(context(), layer, (50,), stream=0, like=LIKE))
    assert ((drawn > 0) & (drawn < 1)).all()
    for other in (
        uniform(context(), layer + 1, (50,), stream=0, like=LIKE),
        uniform(context(), layer, (50,), stream=1, like=LIKE),
        uniform(context(4), layer, (50,), stream=0, like=LIKE),
    ):
        assert not torch.isclose(drawn, other).any()


@pytest.mark.parametrize(
    ("draw", "mean", "variance"),
    [(uniform, 0.5, 1 / 12), (normal, 0.0, 1.0), (gumbel, 0.5772156649, math.pi**2 / 6)],
)
def test_distribution(draw, mean: float, variance: float) -> None:
    drawn = draw(context(), 5, (200, 500), stream=2, like=LIKE)
    assert drawn.mean().item() == pytest.approx(mean, abs=0.015)
    assert drawn.var().item() == pytest.approx(variance, rel=0.03)
    rows = torch.corrcoef(drawn[:20]) - torch.eye(20, dtype=torch.float64)
    assert rows.abs().max() < 0.2
