"""Random routing: uniform draws by the seed, one draw a sequence, what evaluation does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import RandomConfig, RandomRouter, Routing, RoutingContext

N, D, T = 6, 2, 3000


def route(router: RandomRouter, seed: int = 0, batch_size: int = 1) -> Routing:
    return router(torch.zeros(T, D), RoutingContext(batch_size=batch_size, seed=torch.tensor(seed)))


def make_router(training: bool = True, **fields: Any) -> RandomRouter:
    return RandomConfig.from_dict({"top_k": 2, **fields}).build(D, N).train(training)


def counts(index_TK: Tensor) -> Tensor:
    return index_TK.flatten().bincount(minlength=N)


def test_draws_are_uniform_over_pairs_of_experts() -> None:
    """15 pairs, 3000 tokens: 200 each, standard deviation below 14."""
    index_TK = route(make_router()).index_TK.sort(-1).values
    pair_counts = counts(index_TK[:, 0] * N + index_TK[:, 1])
    pair_counts = pair_counts[pair_counts > 0]
    assert len(pair_counts) == 15
    assert (pair_counts - 200).abs().max() < 56


def test_every_seed_and_layer_draws_anew() -> None:
    router, other = make_router(), make_router()
    other.layer = 1
    first = route(router).index_TK.sort(-1).values
    for routing in (route(router, seed=1), route(other)):
        same = (routing.index_TK.sort(-1).values == first).all(-1).double().mean().item()
        assert abs(same - 1 / 15) < 0.02


def test_a_sequence_draws_once() -> None:
    index_TK = route(make_router(unit="sequence"), batch_size=300).index_TK
    index_BLK = index_TK.view(300, 10, 2)
    assert torch.equal(index_BLK, index_BLK[:, :1].expand_as(index_BLK))
    assert counts(index_BLK[:, 0]).min() > 60  # 100 each


def test_weights_are_equal_and_scores_mark_the_picks() -> None:
    routing = route(make_router(top_k=3))
    torch.testing.assert_close(routing.weight_TK, torch.full((T, 3), 1 / 3))
    assert torch.equal(routing.scores_TN, torch.zeros(T, N).scatter(-1, routing.index_TK, 1.0))


@pytest.mark.parametrize(
    ("evaluation", "index", "weight"),
    [("first", [0, 1], [0.5, 0.5]), ("all", [0, 1, 2, 3, 4, 5], [1 / 6] * 6)],
)
def test_evaluation_draws_nothing(evaluation: str, index: list[int], weight: list[float]) -> None:
    routing = route(make_router(training=False, evaluation=evaluation))
    assert routing.index_TK.unique(dim=0).tolist() == [index]
    torch.testing.assert_close(routing.weight_TK[0], torch.tensor(weight))


def test_evaluation_may_draw_as_training_does() -> None:
    drawing = {"evaluation": "random"}
    assert torch.equal(route(make_router(training=False, **drawing)).index_TK, route(make_router()).index_TK)
    assert RandomConfig(top_k=2, evaluation="random").unservable


def test_ensemble_trains_on_k_experts() -> None:
    """The record is as wide as in evaluation."""
    routing, expected = route(make_router(evaluation="all")), route(make_router())
    assert torch.equal(routing.index_TK[:, :2], expected.index_TK)
    assert (routing.index_TK[:, 2:] == N).all()
    torch.testing.assert_close(routing.weight_TK[0], torch.tensor([0.5, 0.5, 0, 0, 0, 0]))
    assert torch.equal(routing.scores_TN, expected.scores_TN)


def test_too_many_picks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"top_k = 7 is larger than num_experts \(6\)"):
        make_router(top_k=7)
