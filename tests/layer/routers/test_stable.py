"""StableMoE: its two stages by hand, the distillation loss, freezing for good, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import (
    LayerLoad,
    LoadBalancing,
    MoESpec,
    RouterLoss,
    Routing,
    RoutingContext,
    StableBalance,
    StableConfig,
    StableRouter,
    ZLoss,
)

N, D, V, WIDTH, T = 5, 4, 7, 3, 30
IDS_T = torch.randint(V, (T,), generator=torch.Generator().manual_seed(1))


def make_router(**fields: Any) -> StableRouter:
    router = StableConfig.from_dict({"vocabulary_size": V, "width": WIDTH, **fields}).build(D, N).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return router


def tokens(seed: int = 2) -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def route(router: StableRouter, x_TD: Tensor, **context: Any) -> Routing:
    return router(x_TD, RoutingContext(token_ids_T=IDS_T, **context))


def step(router: StableRouter, progress: float) -> None:
    router.post_step(LayerLoad.of(route(router, tokens())), progress)


def test_stage_1_is_greedy_with_a_sigmoid_weight() -> None:
    router, x_TD = make_router(), tokens()
    routing = route(router, x_TD)
    for token in range(T):
        s_N = (router.weight @ x_TD[token]).tolist()
        best = max(range(N), key=lambda expert: s_N[expert])
        assert routing.index_TK[token].tolist() == [best]
        assert routing.weight_TK[token].item() == pytest.approx(1 / (1 + torch.tensor(-s_N[best]).exp().item()))


def test_light_router_learns_the_picked_experts_by_cross_entropy() -> None:
    router, x_TD = make_router(), tokens()
    routing = route(router, x_TD)
    for token in range(T):
        probability_N = (router.token_weight @ router.token_embedding[IDS_T[token]]).softmax(0)
        expected = -probability_N[routing.index_TK[token, 0]].log()
        torch.testing.assert_close(routing.auxiliary["distillation"][token], expected)
    routing.auxiliary["distillation"].sum().backward()
    assert router.weight.grad is None  # the teacher learns nothing from its pupil
    for parameter in (router.token_embedding, router.token_weight):
        assert parameter.grad is not None
        assert parameter.grad.any()


def test_distillation_makes_the_table_agree_with_the_learned_routing() -> None:
    """Hidden states that follow from the id, as near the embedding: the light router can name every expert."""
    torch.manual_seed(0)
    router = make_router()
    x_TD = torch.randn(V, D, dtype=torch.float64)[IDS_T]
    context, loss = RoutingContext(token_ids_T=IDS_T), RouterLoss(coefficient=1.0, loss="distillation")
    optimizer = torch.optim.Adam(router.parameters(), lr=0.1)
    before = loss.per_sequence(router(x_TD, context), context).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss.per_sequence(router(x_TD, context), context).sum().backward()
        optimizer.step()
    assert loss.per_sequence(router(x_TD, context), context).item() < 0.05 < before
    learned = router(x_TD, context).index_TK
    router.post_step(LayerLoad.of(router(x_TD, context)), 1.0)
    assert torch.equal(router(x_TD, context).index_TK, learned)
    assert learned.unique().numel() > 1


def test_stage_2_routes_by_the_table_and_weighs_by_the_hidden_state() -> None:
    router = make_router(freeze_at=0.25)
    step(router, 0.2)
    assert not router.frozen
    step(router, 0.25)
    assert router.frozen
    light_VN = router.token_embedding @ router.token_weight.T
    x_TD = tokens(seed=3)
    routing = route(router, x_TD)
    assert torch.equal(routing.index_TK.flatten(), light_VN.argmax(-1)[IDS_T])
    s_TN = x_TD @ router.weight.T
    torch.testing.assert_close(routing.weight_TK, s_TN.sigmoid().gather(-1, routing.index_TK))
    assert not routing.auxiliary["distillation"].any()
    assert torch.equal(routing.selection_TN.argmax(-1), routing.index_TK.flatten())


def test_frozen_routing_stays_whatever_is_trained() -> None:
    router = make_router()
    step(router, 0.5)
    expected = route(router, tokens()).index_TK
    routing = route(router, tokens())
    for loss in (LoadBalancing(coefficient=1.0), StableBalance(coefficient=1.0), ZLoss(coefficient=1.0)):
        loss_B = loss.per_sequence(routing, RoutingContext())
        assert not torch.autograd.grad(loss_B.sum(), router.weight, retain_graph=True)[0].any()  # stage 2 has none
        loss_B = loss.per_sequence(route(make_router(), tokens()), RoutingContext())
        assert loss_B.requires_grad
    (routing.weight_TK.sum() + routing.auxiliary["distillation"].sum()).backward()
    assert router.weight.grad is not None
    assert router.weight.grad.any()
    for parameter in router.parameters():
        parameter.data.normal_()
    step(router, 0.9)  # does not freeze anew
    assert torch.equal(route(router, tokens(seed=4)).index_TK, expected)
    other = make_router()
    other.load_state_dict(copy.deepcopy(router.state_dict()))
    assert other.frozen
    assert torch.equal(route(other, tokens()).index_TK, expected)


def test_loss_is_a_mean_over_real_tokens() -> None:
    routing = route(make_router(), tokens())
    loss_T = routing.auxiliary["distillation"]
    mask_T = torch.arange(T) % 15 < torch.tensor([4, 0]).repeat_interleave(15)
    loss_B = RouterLoss(coefficient=1.0, loss="distillation").per_sequence(
        routing, RoutingContext(batch_size=2, mask_T=mask_T)
    )
    torch.testing.assert_close(loss_B, torch.stack([loss_T[:4].mean(), torch.zeros((), dtype=torch.float64)]))
    plain_B = RouterLoss(coefficient=1.0, loss="distillation").per_sequence(routing, RoutingContext(batch_size=2))
    torch.testing.assert_close(plain_B, loss_T.view(2, 15).mean(-1))


def test_weights_have_the_gradients_of_finite_differences() -> None:
    router = make_router()
    assert torch.autograd.gradcheck(lambda x_TD: route(router, x_TD).weight_TK, tokens().requires_grad_())


def spec_of(router: dict[str, Any]) -> MoESpec:
    return MoESpec.from_dict(
        {
            "experts": {"num_experts": N, "intermediate_size": 4},
            "router": router,
            "balance": [{"type": "router", "loss": "distillation", "coefficient": 1.0}],
        }
    )


def test_loss_goes_with_routers_that_distil() -> None:
    assert spec_of({"type": "stable", "vocabulary_size": V}).balance[0].name == "distillation"
    with pytest.raises(ConfigError, match=r"balance\.0\.loss = 'distillation' is no loss of router top_k"):
        spec_of({"type": "top_k", "top_k": 1})


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_share_of_the_training_is_asked_for(value: float) -> None:
    with pytest.raises(ConfigError, match="freeze_at"):
        make_router(freeze_at=value)


def test_unknown_ids_are_refused() -> None:
    with pytest.raises(ConfigError, match=rf"token_ids = {V} is not in \[0, {V}\)"):
        make_router()(tokens()[:1], RoutingContext(token_ids_T=torch.tensor([V])))
