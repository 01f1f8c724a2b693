"""The balance objective: sums, weights, and gradients under checkpointing of some or all layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.layer import BalanceLoss, LoadBalancing, MoEBlock, MoESpec, RoutingContext, ZLoss
from moesaic.layer.balance import BalanceObjective

B, LENGTH, D = 2, 5, 6
LOSSES: list[BalanceLoss] = [LoadBalancing(coefficient=0.3), ZLoss(coefficient=0.2)]
SPEC = MoESpec.from_dict(
    {"experts": {"num_experts": 4, "intermediate_size": 5}, "router": {"type": "top_k", "top_k": 2}}
)


def make_blocks() -> nn.ModuleList:
    torch.manual_seed(0)
    blocks = nn.ModuleList([MoEBlock(SPEC, D, layer=layer) for layer in range(3)]).double()
    for block in blocks:
        nn.init.normal_(block.gate.weight)  # type: ignore[arg-type]  # far from uniform, so that the losses matter
    return blocks


def total_loss(blocks: nn.ModuleList, reentrant: dict[int, bool]) -> tuple[Tensor, dict[str, Tensor], RoutingContext]:
    """Run the blocks, those in `reentrant` under checkpointing of that kind, and add the balance losses."""
    torch.manual_seed(1)
    x_BTD = torch.randn(B, LENGTH, D, dtype=torch.float64).requires_grad_()
    context = RoutingContext(batch_size=B)
    for layer, block in enumerate(blocks):
        if layer in reentrant:
            x_BTD = x_BTD + checkpoint(block, x_BTD, context, use_reentrant=reentrant[layer])  # type: ignore[operator]
        else:
            x_BTD = x_BTD + block(x_BTD, context)
    objective = BalanceObjective(LOSSES, torch.tensor([0.7, 0.3], dtype=torch.float64))
    aux_losses = objective.by_name(context)
    return objective.add_to(x_BTD.square().mean(), aux_losses, context), aux_losses, context


def gradients(blocks: nn.ModuleList, reentrant: dict[int, bool]) -> tuple[Tensor, dict[str, Tensor | None]]:
    total, _, _ = total_loss(blocks, reentrant)
    (total / 8).backward()  # as a trainer does that divides by its accumulation steps
    return total.detach(), {name: parameter.grad for name, parameter in blocks.named_parameters()}


def test_total_is_the_language_loss_plus_every_weighted_loss_of_every_layer() -> None:
    total, aux_losses, context = total_loss(make_blocks(), {})
    assert set(aux_losses) == {"load_balancing", "z_loss"}
    for loss in LOSSES:
        expected = sum(
            loss.coefficient * (loss.per_sequence(routing, context).detach() * torch.tensor([0.7, 0.3])).sum().item()
            for routing in context.records.values()
        )
        assert aux_losses[loss.name].item() == pytest.approx(expected)
    language_loss = total - sum(aux_losses.values())
    blocks = make_blocks()
    torch.manual_seed(1)
    x_BTD = torch.randn(B, LENGTH, D, dtype=torch.float64)
    for block in blocks:
        x_BTD = x_BTD + block(x_BTD)
    assert language_loss.item() == pytest.approx(x_BTD.square().mean().item())


@pytest.mark.parametrize(
    "reentrant",
    [{0: True, 1: True, 2: True}, {0: False, 1: False, 2: False}, {1: True}, {0: True, 2: False}],
    ids=["all reentrant", "none reentrant", "one reentrant", "mixed"],
)
def test_checkpointing_changes_neither_loss_nor_gradients(reentrant: dict[int, bool]) -> None:
    expected_loss, expected = gradients(make_blocks(), {})
    actual_loss, actual = gradients(make_blocks(), reentrant)
    assert actual_loss == expected_loss
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reentrant", [{}, {0: True, 1: True, 2: True}])
def test_frozen_router_gets_no_gradient_and_disturbs_no_other(reentrant: dict[int, bool]) -> None:
    def frozen() -> nn.ModuleList:
        blocks = make_blocks()
        blocks[0].gate.requires_grad_(False)  # type: ignore[union-attr]
        return blocks

    # The input has a gradient, so the first layer's balance losses still reach it, not the router.
    _, expected = gradients(make_blocks(), {})
    _, actual = gradients(frozen(), reentrant)
    assert actual.pop("0.gate.weight") is None
    del expected["0.gate.weight"]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


def test_recomputation_adds_nothing_where_the_first_run_had_a_graph() -> None:
    """Below, a frozen layer whose record has no gradient; above, a norm, whose saved tensors must stay in place."""

    def gradient(checkpointed: bool) -> Tensor:
        blocks, norm, context = make_blocks(), nn.LayerNorm(D).double(), RoutingContext(batch_size=B)
        blocks[0].requires_grad_(False)
        x_BTD = torch.randn(B, LENGTH, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for block in blocks:

            def run(x_BTD: Tensor, block: nn.Module = block) -> Tensor:
                return x_BTD + norm(block(x_BTD, context))

            x_BTD = checkpoint(run, x_BTD, use_reentrant=False) if checkpointed else run(x_BTD)  # type: ignore[assignment]
        objective = BalanceObjective(LOSSES, torch.tensor([0.7, 0.3], dtype=torch.float64))
        objective.add_to(x_BTD.square().mean(), objective.by_name(context), context).backward()
        weight = blocks[1].gate.weight  # type: ignore[union-attr]
        assert weight.grad is not None
        return weight.grad  # type: ignore[return-value]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-12, atol=1e-14)


def test_no_losses_leave_the_language_loss_alone() -> None:
    objective = BalanceObjective([], torch.ones(1))
    context = RoutingContext()
    MoEBlock(SPEC, D)(torch.randn(3, D), context)
    loss = torch.tensor(2.0, requires_grad=True)
    assert objective.by_name(context) == {}
    assert objective.add_to(loss, {}, context).item() == 2.0
