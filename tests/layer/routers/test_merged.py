"""Merged experts (SMEAR): worked weights, expert dropout, padding, what equal experts come to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import MergedConfig, MergedRouter, MoEBlock, MoESpec, RoutingContext
from moesaic.layer.assignment import Merge

PLAIN = {"expert_dropout": 0.0, "normalize_input": False, "normalize_weight": False}


def make_router(num_experts: int, *, training: bool = True, **fields: Any) -> MergedRouter:
    """A router with identity weights, in float64: its logits are the mean of its input."""
    router = MergedConfig.from_dict(fields).build(num_experts, num_experts).double().train(training)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


def test_weights_are_the_softmax_of_the_mean_token() -> None:
    """Means log 1, log 3 and log 2, log 2 (arXiv 2306.03745, section 3)."""
    x_TN = torch.tensor([[0.5, 2.0], [2.0, 4.5], [2.0, 2.0], [2.0, 2.0]], dtype=torch.float64).log()
    routing = make_router(2, **PLAIN)(x_TN, RoutingContext(batch_size=2))
    expected_TN = torch.tensor([[1 / 4, 3 / 4]] * 2 + [[1 / 2, 1 / 2]] * 2, dtype=torch.float64)
    torch.testing.assert_close(routing.weight_TK, expected_TN)
    torch.testing.assert_close(routing.scores_TN, expected_TN)
    assert routing.index_TK.tolist() == [[0, 1]] * 4
    assert isinstance(routing.assignment, Merge)
    assert routing.assignment.group_T.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(routing.assignment.weight_GN, expected_TN[[0, 2]])


def test_input_and_weight_rows_are_normalised() -> None:
    torch.manual_seed(0)
    router = MergedConfig(expert_dropout=0.0).build(6, 3).double()
    x_TD = torch.randn(5, 6, dtype=torch.float64)
    mean_D = x_TD.mean(0)
    rows = [mean_D, *router.weight]
    unit = [(row - row.mean()) / (row.var(correction=0) + 1e-5).sqrt() for row in rows]
    expected_N = torch.stack([unit[0] @ row for row in unit[1:]])
    torch.testing.assert_close(router(x_TD).logits_TN, expected_N.expand(5, 3))


def test_dropped_experts_have_no_weight_and_the_others_sum_to_one() -> None:
    router = make_router(4, **PLAIN | {"expert_dropout": 0.5})
    x_TN = torch.randn(400, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    context = RoutingContext(batch_size=400, seed=torch.tensor(1))
    routing = router(x_TN, context)
    dropped = routing.weight_TK == 0
    assert 0.4 < dropped.double().mean().item() < 0.5  # of all but the cases where all would be dropped: 15/32
    assert not dropped.all(-1).any()
    torch.testing.assert_close(routing.weight_TK.sum(-1), torch.ones(400, dtype=torch.float64))
    kept_TN = routing.scores_TN * ~dropped
    torch.testing.assert_close(routing.weight_TK, kept_TN / kept_TN.sum(-1, keepdim=True))
    other = router(x_TN, replace(context, seed=torch.tensor(2)))
    assert not torch.equal(other.weight_TK, routing.weight_TK)
    plain = router.eval()(x_TN, context)
    assert torch.equal(plain.weight_TK, plain.scores_TN)


@pytest.mark.parametrize("filler", [0.0, 1e3, float("inf")])
def test_padding_is_no_part_of_the_mean_and_passes_no_expert(filler: float) -> None:
    x_BLN = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask_BL = torch.tensor([[True] * 4, [False, False, True, True], [False] * 4])
    x_BLN[~mask_BL] = filler
    routing = make_router(2, **PLAIN)(x_BLN.flatten(0, 1), RoutingContext(batch_size=3, mask_T=mask_BL.flatten()))
    assert isinstance(routing.assignment, Merge)
    assert routing.assignment.group_T.tolist() == [0, 0, 0, 0, 3, 3, 1, 1, 3, 3, 3, 3]
    torch.testing.assert_close(routing.assignment.weight_GN[0], x_BLN[0].mean(0).softmax(-1))
    torch.testing.assert_close(routing.assignment.weight_GN[1], x_BLN[1, 2:].mean(0).softmax(-1))
    assert routing.assignment.weight_GN.isfinite().all()
    assert not routing.weight_TK.view(3, 4, 2)[~mask_BL].any()


def make_block(router: dict[str, Any], **experts: Any) -> MoEBlock:
    torch.manual_seed(0)
    spec = MoESpec.from_dict({"experts": {"num_experts": 3, "intermediate_size": 5, **experts}, "router": router})
    block = MoEBlock(spec, 4).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    return block


def test_merging_equal_experts_is_that_expert() -> None:
    block = make_block({"type": "merged", **PLAIN}, bias=True)
    with torch.no_grad():
        for parameter in block.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    x_BLD = torch.randn(2, 3, 4, dtype=torch.float64)
    zero = torch.zeros(6, 1, dtype=torch.int64)
    expected = block.experts(x_BLD.view(6, 4), zero, torch.ones(6, 1, dtype=torch.float64))
    torch.testing.assert_close(block(x_BLD, RoutingContext(batch_size=2)), expected.view(2, 3, 4))


def test_layer_is_differentiable_in_tokens_and_router() -> None:
    block = make_block({"type": "merged", "expert_dropout": 0.0}, kernel="loop")
    x_TD = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def run(x_TD: Tensor, weight_ND: Tensor) -> Tensor:
        return torch.func.functional_call(block, {"gate.weight": weight_ND}, (x_TD,))

    assert torch.autograd.gradcheck(run, (x_TD, block.gate.weight))


def test_facts() -> None:
    config = MergedConfig()
    assert config.depends_on(training=True) == {"later_tokens", "random_numbers"}
    assert config.depends_on(training=False) == {"later_tokens"}
    assert config.unservable == "the routing of a token depends on later tokens"
    assert make_router(4).picks == 1
    with pytest.raises(ConfigError, match=r"capacity .* does not go with router merged: experts are merged"):
        MoESpec.from_dict(
            {
                "experts": {"num_experts": 4, "intermediate_size": 8},
                "router": {"type": "merged"},
                "capacity": {"factor": 1.0},
            }
        )


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_bad_dropout_is_refused_by_name(value: float) -> None:
    with pytest.raises(ConfigError, match=f"^expert_dropout = {value} is not valid"):
        MergedConfig.from_dict({"expert_dropout": value})


def test_initial_weights_are_near_equal() -> None:
    torch.manual_seed(0)
    router = MergedConfig.from_dict(PLAIN).build(64, 4).eval()
    weight_TK = router(F.normalize(torch.randn(8, 64))).weight_TK
    torch.testing.assert_close(weight_TK, torch.full((8, 4), 0.25), rtol=0, atol=0.02)


def test_experts_that_are_kept_have_weights_beside_a_dropped_one_that_takes_all() -> None:
    """Normalised rows of width D give logits up to D, and the softmax of the lower ones is 0."""
    router = MergedConfig(expert_dropout=0.5).build(1024, 2).train()
    direction_D = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        router.weight.copy_(torch.stack([direction_D, -direction_D]))
    routing = router(direction_D.expand(32, -1), RoutingContext(batch_size=32, seed=torch.tensor(1)))
    torch.testing.assert_close(routing.weight_TK.sum(-1), torch.ones(32))
    assert set(routing.weight_TK[:, 0].tolist()) == {0.0, 1.0}
    routing.weight_TK.square().sum().backward()
    assert router.weight.grad is not None
    assert router.weight.grad.isfinite().all()
