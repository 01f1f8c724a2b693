"""DeepSpeed's gates as presets of our fields: the same picks, drops, weights and balance losses.

Runs where DeepSpeed is installed (`pip install deepspeed`, 0.19.8 when this was written); it is no dependency.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.layer.test_capacity import LOGITS, config_of, limit, route
from torch import Tensor

from moesaic.layer import LayerLoad, LoadBalancing, Routing, RoutingContext

gates = pytest.importorskip("deepspeed.moe.sharded_moe")

TOKENS, EXPERTS = 64, 8
FACTORS = [0.25, 0.5, 1.0, 1.5]


def logits_of(seed: int) -> Tensor:
    """Skewed, so that some experts overflow and others stay empty; all negative for odd seeds."""
    logits_TN = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))
    return logits_TN + torch.arange(EXPERTS) * 0.3 - 50 * (seed % 2)


def ours(logits_TN: Tensor, k: int, **values: Any) -> Routing:
    config = config_of(scope="batch", renormalize=k > 1, **values)
    return limit(route(logits_TN, k, normalize=k > 1), config, RoutingContext(seed=torch.tensor(0)))


def dense(routing: Routing) -> Tensor:
    """Weight of every expert for every token, (T, N)."""
    weight_TN = torch.zeros(len(routing.index_TK), routing.num_experts + 1)
    return weight_TN.scatter_add(-1, routing.index_TK, routing.weight_TK.float())[:, :-1]


def balance(routing: Routing) -> Tensor:
    return LoadBalancing(coefficient=1).per_sequence(routing, RoutingContext())[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("minimum", [0, 12])
@pytest.mark.parametrize("factor", FACTORS)
def test_top_1(factor: float, minimum: int, seed: int) -> None:
    """Which tokens random selection keeps is chance, how many is not; without overflow all of it is the same."""
    loss, combine_TNC, _, counts_N = gates.top1gating(logits_of(seed), factor, minimum, use_rts=True)
    routing = ours(logits_of(seed), 1, factor=factor, minimum=minimum, policy="random")
    theirs_TN = combine_TNC.sum(-1)
    assert LayerLoad.of(routing).chosen_M.tolist() == counts_N.tolist()
    assert LayerLoad.of(routing).load_N.tolist() == (theirs_TN > 0).sum(0).tolist()
    both_TN = (theirs_TN > 0) & (dense(routing) > 0)
    torch.testing.assert_close(dense(routing)[both_TN], theirs_TN[both_TN])
    torch.testing.assert_close(balance(routing), loss)
    loss, combine_TNC, _, _ = gates.top1gating(logits_of(seed), 8.0, minimum, use_rts=True)
    torch.testing.assert_close(dense(ours(logits_of(seed), 1, factor=8)), combine_TNC.sum(-1))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("minimum", [0, 12])
@pytest.mark.parametrize("factor", FACTORS)
def test_top_2(factor: float, minimum: int, seed: int) -> None:
    loss, combine_TNC, _, counts_N = gates.top2gating(logits_of(seed), factor, minimum, top2_2nd_expert_sampling=False)
    routing = ours(logits_of(seed), 2, factor=factor, minimum=minimum, choice_order="rank_first")
    assert LayerLoad.of(routing).chosen_M.tolist() == counts_N.tolist()
    torch.testing.assert_close(dense(routing), combine_TNC.sum(-1))
    # Its loss counts first choices only.
    torch.testing.assert_close(balance(route(logits_of(seed), 1)), loss)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("minimum", [0, 12])
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize(("policy", "theirs"), [("probability", "probs"), ("position", "position")])
def test_top_k(policy: str, theirs: str, k: int, factor: float, minimum: int, seed: int) -> None:
    loss, combine_TNC, _, counts_N = gates.topkgating(logits_of(seed), k, factor, minimum, drop_policy=theirs)
    routing = ours(logits_of(seed), k, factor=factor, minimum=minimum, policy=policy)
    assert LayerLoad.of(routing).chosen_M.tolist() == counts_N.tolist()
    torch.testing.assert_close(dense(routing), combine_TNC.sum(-1))
    torch.testing.assert_close(balance(routing), loss)


def test_the_worked_example_is_theirs() -> None:
    logits_TN = LOGITS.float()
    loss, combine_TNC, _, counts_N = gates.top1gating(logits_TN, 1.0, 0)
    assert (combine_TNC.shape[-1], counts_N.tolist(), round(loss.item(), 6)) == (2, [4, 1, 1], 1.280841)
    loss, combine_TNC, _, counts_N = gates.top2gating(logits_TN.clone(), 1.0, 0, top2_2nd_expert_sampling=False)
    assert (combine_TNC.shape[-1], counts_N.tolist(), round(loss.item(), 6)) == (4, [6, 3, 3], 1.280841)
    loss, combine_TNC, _, _ = gates.topkgating(logits_TN, 2, 0.75, 0)
    assert (combine_TNC.shape[-1], round(loss.item(), 6)) == (3, 1.140421)


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "minimum"), [(8, 4, 1, 4), (6, 4, 1.25, 1), (100, 8, 1.25, 4), (7, 4, 1, 0)]
)
def test_number_of_slots(tokens: int, experts: int, factor: float, minimum: int) -> None:
    expected = gates._capacity(torch.zeros(tokens, experts), torch.tensor(factor), torch.tensor(minimum))
    config = config_of(factor=factor, minimum=minimum)
    assert config.slots(torch.tensor(tokens), experts, 1, training=True) == expected
