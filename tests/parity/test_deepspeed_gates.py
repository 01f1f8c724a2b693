"""DeepSpeed's gates as presets of our fields: the same picks, drops, weights and balance losses, also by chance.

Runs where DeepSpeed is installed (0.19.8 when this was written): `make test` tries to install it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.layer.test_capacity import LOGITS, config_of, limit, route
from torch import Tensor

from moesaic.layer import LayerLoad, LoadBalancing, Routing, RoutingContext, SampledSecondConfig

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


def balance(routing: Routing, **values: Any) -> Tensor:
    return LoadBalancing(coefficient=1, **values).per_sequence(routing, RoutingContext())[0]


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
    torch.testing.assert_close(balance(routing, counts="first"), loss)


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


def repeated(logits_TN: Tensor, draws: int) -> tuple[Routing, RoutingContext]:
    """Ours for many draws at once: the same tokens as the sequences of one batch, each with slots of its own."""
    routing = limit(
        route(logits_TN.repeat(draws, 1), 1),
        config_of(factor=0.5, policy="random"),
        context := RoutingContext(batch_size=draws, seed=torch.tensor(3)),
    )
    return routing, context


def test_random_selection_keeps_as_many_of_each_expert_and_each_candidate_as_often() -> None:
    """Of n candidates each is kept with probability C / n, wherever it stands: theirs and ours, by frequency."""
    draws, logits_TN = 2000, logits_of(2)
    torch.manual_seed(0)
    theirs_DT = torch.stack([gates.top1gating(logits_TN, 0.5, 0)[1].sum((1, 2)) > 0 for _ in range(draws)])
    ours_DT = (repeated(logits_TN, draws)[0].weight_TK > 0).view(draws, TOKENS)
    expert_T = logits_TN.argmax(-1)
    counts_N = torch.bincount(expert_T, minlength=EXPERTS)
    kept_N = counts_N.clamp(max=4)
    assert (counts_N > 4).any()
    expected_T = (kept_N / counts_N)[expert_T]
    deviation_T = (expected_T * (1 - expected_T) / draws).sqrt()
    for name, kept_DT in {"theirs": theirs_DT, "ours": ours_DT}.items():
        for expert in range(EXPERTS):
            assert (kept_DT[:, expert_T == expert].sum(-1) == kept_N[expert]).all(), name
        # Of 64 frequencies the largest is hardly ever further off than four and a half deviations.
        assert ((kept_DT.float().mean(0) - expected_T).abs() <= 4.5 * deviation_T + 1e-6).all(), name


def test_random_selection_draws_pairs_as_often_as_they_do() -> None:
    """Not only each candidate but each set of kept ones has its chance: the six pairs of the worked example."""
    draws = 3000
    torch.manual_seed(0)
    theirs_DT = torch.stack([gates.top1gating(LOGITS.float(), 1.0, 0)[1].sum((1, 2)) > 0 for _ in range(draws)])
    context = RoutingContext(batch_size=draws, seed=torch.tensor(0))
    routing = limit(route(LOGITS.repeat(draws, 1), 1), config_of(policy="random"), context)
    ours_DT = (routing.weight_TK > 0).view(draws, 6)
    for kept_DT in (theirs_DT, ours_DT):
        assert kept_DT[:, [2, 4]].all()
        pair_D = kept_DT[:, [0, 1, 3, 5]].long() @ torch.tensor([8, 4, 2, 1])
        share = torch.bincount(pair_D, minlength=16)[[3, 5, 6, 9, 10, 12]] / draws
        assert share.sum() == 1
        torch.testing.assert_close(share, torch.full((6,), 1 / 6), atol=0.03, rtol=0)  # four deviations


def test_a_sampled_second_expert_is_drawn_from_the_same_distribution() -> None:
    draws, logits_N = 40_000, torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    torch.manual_seed(0)
    index_KT = gates.top2gating(logits_N.repeat(draws, 1), 8.0, 0, top2_2nd_expert_sampling=True, sparse_routes=True)[3]
    router = SampledSecondConfig(policy="gumbel").build(4, 4)
    router.weight.data = torch.eye(4)
    index_TK = router(logits_N.repeat(draws, 1), RoutingContext(seed=torch.tensor(1))).index_TK
    assert (index_KT[0] == 1).all()
    assert (index_TK[:, 0] == 1).all()
    for second_T in (index_KT[1].long(), index_TK[:, 1]):
        share_N = torch.bincount(second_T, minlength=4) / draws
        torch.testing.assert_close(share_N, torch.tensor([0.2, 0.0, 0.3, 0.5]), rtol=0, atol=0.01)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_without_drops(k: int, seed: int) -> None:
    """`drop_tokens=False` gives every expert the slots of the fullest one; picks and weights are those without a limit."""
    logits_TN = logits_of(seed)
    if k == 1:
        loss, combine_TNC, _, counts_N = gates.top1gating(logits_TN, 1.0, 0, drop_tokens=False)
    elif k == 2:
        loss, combine_TNC, _, counts_N = gates.top2gating(
            logits_TN, 1.0, 0, drop_tokens=False, top2_2nd_expert_sampling=False
        )
    else:
        loss, combine_TNC, _, counts_N = gates.topkgating(logits_TN, k, 1.0, 0, drop_tokens=False)
    routing = route(logits_of(seed), k, normalize=k > 1)
    load_N = LayerLoad.of(routing).load_N
    assert combine_TNC.shape[-1] == load_N.max()
    assert load_N.tolist() == counts_N.tolist()
    torch.testing.assert_close(dense(routing), combine_TNC.sum(-1))
    torch.testing.assert_close(balance(routing, counts="first" if k == 2 else "all"), loss)


def test_the_loss_may_be_below_one() -> None:
    """Half the tokens pick A, hardly, and the other half B, surely: 0.9906 for both of us."""
    probability_TN = torch.tensor([[0.51, 0.49]] * 51 + [[0.01, 0.99]] * 49)
    loss = gates.top1gating(probability_TN.log(), 4.0, 0)[0]
    assert loss.item() == pytest.approx(0.9906, abs=5e-5)
    torch.testing.assert_close(balance(route(probability_TN.log(), 1)), loss)


def test_padding_counts_for_them_and_not_for_us() -> None:
    """`used_token` takes padding's picks away, but its tokens still count in the slots and in the means of the loss."""
    logits_TN, mask_T = logits_of(0), torch.arange(TOKENS) < TOKENS // 2
    loss, combine_TNC, _, counts_N = gates.top1gating(logits_TN, 1.0, 0, used_token=mask_T.long())
    context = RoutingContext(mask_T=mask_T, seed=torch.tensor(0))
    routing = limit(route(logits_TN, 1), config_of(policy="random"), context)
    real_TN = logits_TN[mask_T]
    assert LayerLoad.of(routing, mask_T).chosen_M.tolist() == counts_N.tolist()
    assert combine_TNC.shape[-1] == 8  # of 64 tokens; ours are those of 32
    assert LayerLoad.of(routing, mask_T).load_N.max() == 4
    ours = LoadBalancing(coefficient=1).per_sequence(routing, context)[0]
    torch.testing.assert_close(ours, balance(route(real_TN, 1)))
    torch.testing.assert_close(gates.top1gating(real_TN, 1.0, 0)[0], ours)
    assert not torch.isclose(loss, ours, rtol=0.1)


def test_their_number_of_slots_is_rounded_twice() -> None:
    """100 tokens, 8 experts, factor 1.2: 15, of which float32 makes a little more, and its ceiling 16."""
    theirs = gates._capacity(torch.zeros(100, 8), torch.tensor(1.2), torch.tensor(0))
    assert (theirs.item(), config_of(factor=1.2).slots(torch.tensor(100), 8, 1, training=True).item()) == (16, 15)


def test_without_random_selection_their_top_1_is_not_first_come_first_served() -> None:
    """Which of equal entries `torch.topk` finds is not said; only the number is sure. Ours are the first."""
    combine_TNC = gates.top1gating(LOGITS.float(), 1.0, 0, use_rts=False)[1]
    assert ((combine_TNC.sum(-1) > 0).sum(0) == torch.tensor([2, 1, 1])).all()
    assert (ours(LOGITS.float(), 1).index_TK[:2] == 0).all()


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
