"""Soft slots: worked numbers, what one expert and one slot come to, padding, normalised logits, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import MoEBlock, MoESpec, Routing, RoutingContext, SoftSlotsConfig, SoftSlotsRouter
from moesaic.layer.assignment import Slots


def make_router(weight: list[list[float]], num_experts: int, **fields: Any) -> SoftSlotsRouter:
    router = SoftSlotsConfig.from_dict(fields).build(len(weight[0]), num_experts).double()
    with torch.no_grad():
        router.weight.copy_(torch.tensor(weight, dtype=torch.float64))
    return router


def slots_of(routing: Routing) -> Slots:
    assert isinstance(routing.assignment, Slots)
    return routing.assignment


def test_softmax_over_tokens_fills_slots_and_over_slots_mixes_outputs() -> None:
    """Logits log of [[1, 3], [1, 1], [2, 4]] (arXiv 2308.00951, eq. 1 and 3)."""
    router = make_router([[1.0, 0.0], [0.0, 1.0]], 2, normalize=False)
    x_TD = torch.tensor([[1.0, 3.0], [1.0, 1.0], [2.0, 4.0]], dtype=torch.float64).log()
    routing = router(x_TD)
    expected = torch.tensor([[1 / 4, 3 / 8], [1 / 4, 1 / 8], [2 / 4, 4 / 8]], dtype=torch.float64)
    torch.testing.assert_close(slots_of(routing).dispatch_BLP, expected[None])
    expected = torch.tensor([[1 / 4, 3 / 4], [1 / 2, 1 / 2], [1 / 3, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(slots_of(routing).combine_BLP, expected[None])
    torch.testing.assert_close(routing.weight_TK, expected)
    assert routing.index_TK.tolist() == [[0, 1]] * 3


def test_weight_of_an_expert_is_the_sum_over_its_slots() -> None:
    torch.manual_seed(0)
    router = SoftSlotsConfig(slots_per_expert=3).build(6, 4).double()
    routing = router(torch.randn(10, 6, dtype=torch.float64), RoutingContext(batch_size=2))
    combine_BLP = slots_of(routing).combine_BLP
    assert combine_BLP.shape == (2, 5, 12)
    torch.testing.assert_close(combine_BLP.view(10, 4, 3).sum(-1), routing.weight_TK)
    torch.testing.assert_close(slots_of(routing).dispatch_BLP.sum(1), torch.ones(2, 12, dtype=torch.float64))


def test_normalised_logits_are_scale_times_cosine() -> None:
    router = make_router([[3.0, 4.0], [0.0, 2.0]], 2, normalization_epsilon=0.0)
    assert router.scale is not None
    assert router.scale.tolist() == [1.0]
    router.scale.data.fill_(5.0)
    x_TD = torch.tensor([[10.0, 0.0], [-6.0, 8.0]], dtype=torch.float64)
    torch.testing.assert_close(router(x_TD).logits_TN, torch.tensor([[3.0, 0.0], [1.4, 4.0]], dtype=torch.float64))


@pytest.mark.parametrize("normalize", [True, False])
def test_zero_token_is_finite_forward_and_backward(normalize: bool) -> None:
    torch.manual_seed(0)
    router = SoftSlotsConfig(normalize=normalize).build(3, 2)
    x_TD = torch.zeros(4, 3, requires_grad=True)
    routing = router(x_TD)
    (slots_of(routing).dispatch_BLP.square().sum() + routing.weight_TK.square().sum()).backward()
    assert x_TD.grad is not None
    assert x_TD.grad.isfinite().all()


@pytest.mark.parametrize("filler", [0.0, 100.0])
def test_padding_is_no_part_of_any_slot(filler: float) -> None:
    torch.manual_seed(0)
    router = SoftSlotsConfig(slots_per_expert=2).build(4, 3).double()
    x_BLD = torch.randn(3, 5, 4, dtype=torch.float64)
    mask_BL = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    x_BLD[~mask_BL] = filler
    slots = slots_of(router(x_BLD.flatten(0, 1), RoutingContext(batch_size=3, mask_T=mask_BL.flatten())))
    assert not slots.dispatch_BLP[~mask_BL].any()
    torch.testing.assert_close(slots.dispatch_BLP[:2].sum(1), torch.ones(2, 6, dtype=torch.float64))
    torch.testing.assert_close(slots.dispatch_BLP[1:2, :2], slots_of(router(x_BLD[1, :2])).dispatch_BLP)


def block(slots_per_expert: int = 1, **experts: Any) -> MoEBlock:
    torch.manual_seed(0)
    spec = MoESpec.from_dict(
        {
            "experts": {"num_experts": 4, "intermediate_size": 5, **experts},
            "router": {"type": "soft_slots", "slots_per_expert": slots_per_expert},
        }
    )
    made = MoEBlock(spec, 6).double()
    for parameter in made.experts.parameters():
        torch.nn.init.normal_(parameter)
    return made


def test_one_token_alone_passes_the_weighted_sum_of_all_experts() -> None:
    """Its slots all hold that token, so that the layer is a dense mixture."""
    layer = block(slots_per_expert=2)
    x_TD = torch.randn(1, 6, dtype=torch.float64)
    routing = layer.gate(x_TD)
    torch.testing.assert_close(layer(x_TD), layer.experts(x_TD, routing.index_TK, routing.weight_TK))


def test_layer_is_differentiable() -> None:
    layer = block(kernel="loop")
    x_TD = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def run(x_TD: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        parameters = {"gate.weight": weight, "gate.scale": scale}
        return torch.func.functional_call(layer, parameters, (x_TD,))

    gate = layer.gate
    assert isinstance(gate, SoftSlotsRouter)
    assert gate.scale is not None
    assert torch.autograd.gradcheck(run, (x_TD, gate.weight, gate.scale))


def test_initial_scale_is_one_and_slots_have_the_asked_spread() -> None:
    router = SoftSlotsConfig(slots_per_expert=16).build(256, 8)
    router.reset_parameters(std=0.05)
    assert router.weight.shape == (128, 256)
    assert router.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert router.scale is not None
    assert router.scale.item() == 1
    assert math.isclose(router(torch.randn(4, 256)).logits_TN.abs().max().item(), math.log(16), abs_tol=0.2)


def test_it_can_not_decode() -> None:
    assert SoftSlotsConfig().unservable == "the routing of a token depends on later tokens"


@pytest.mark.parametrize("fields", [{"slots_per_expert": 0}, {"normalise": True}, {"normalize": "often"}])
def test_bad_configuration_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        SoftSlotsConfig.from_dict(fields)
