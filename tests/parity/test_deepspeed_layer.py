"""DeepSpeed's MoE layer beside our block with the same weights: outputs, balance loss and every gradient.

Runs where DeepSpeed is installed, like `test_deepspeed_gates.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.layer import LoadBalancing, MoEBlock, MoESpec, RoutingContext

layer = pytest.importorskip("deepspeed.moe.layer")

HIDDEN, WIDTH, EXPERTS = 16, 12, 4
# Their gates by K, and what in our capacity is the same; random selection has no equal picks, so it must not bind.
GATES: dict[int, dict[str, Any]] = {
    1: {"policy": "random"},
    2: {"choice_order": "rank_first", "renormalize": True},
    3: {"policy": "probability", "renormalize": True},
}


class GatedExpert(nn.Module):
    """The experts that both compute, in the form that DeepSpeed copies."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(HIDDEN, 2 * WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


def both(k: int, factor: float | None, minimum: int = 4) -> tuple[Any, MoEBlock]:
    """Their layer, and our block with its weights."""
    torch.manual_seed(k)
    theirs = layer.MoE(
        HIDDEN,
        GatedExpert(),
        EXPERTS,
        k=k,
        capacity_factor=factor or 1.0,
        min_capacity=minimum,
        drop_tokens=factor is not None,
        top2_2nd_expert_sampling=False,
    )
    spec: dict[str, Any] = {
        "experts": {"num_experts": EXPERTS, "intermediate_size": WIDTH},
        "router": {"top_k": k, "normalize_top_k": k > 1},
    }
    if factor is not None:
        spec["capacity"] = {"factor": factor, "minimum": minimum, "scope": "batch", **GATES[k]}
    ours = MoEBlock(MoESpec.from_dict(spec), HIDDEN)
    with torch.no_grad():
        for expert in theirs.deepspeed_moe.experts.deepspeed_experts:  # they start as copies of one
            for parameter in expert.parameters():
                nn.init.normal_(parameter, std=0.3)
        for parameter, name in zip(weights(ours), ("gate", "gate_up", "down"), strict=True):
            parameter.copy_(part(theirs, name, lambda weight: weight))
    return theirs, ours


def weights(block: MoEBlock) -> list[Tensor]:
    return [
        block.gate.get_parameter("weight"),
        *(block.experts.get_parameter(f"{n}_proj") for n in ("gate_up", "down")),
    ]


def part(theirs: Any, name: str, of: Any) -> Tensor:
    """`of` their parameters of a kind, in our shape."""
    if name == "gate":
        return of(theirs.deepspeed_moe.gate.wg.weight)
    return torch.stack([of(getattr(expert, name).weight) for expert in theirs.deepspeed_moe.experts.deepspeed_experts])


@pytest.mark.parametrize(("k", "factor"), [(1, None), (1, 4.0), (2, None), (2, 0.5), (2, 1.0), (3, None), (3, 0.75)])
def test_output_loss_and_gradients(k: int, factor: float | None) -> None:
    theirs, ours = both(k, factor)
    x_BTD = torch.randn(2, 12, HIDDEN)
    found = []
    for module in (theirs, ours):
        leaf_BTD = x_BTD.clone().requires_grad_()
        if module is theirs:
            y_BTD, loss, counts_N = theirs(leaf_BTD)
        else:
            context = RoutingContext(seed=torch.tensor(0))
            y_BTD, routing = ours(leaf_BTD, context), context.records[0]
            counts = "first" if k == 2 else "all"
            loss = LoadBalancing(coefficient=1, scope="batch", counts=counts).per_sequence(routing, context)[0]
            assert torch.equal(counts_N, torch.bincount(routing.choice_TK.flatten(), minlength=EXPERTS))
            drops = 0 if routing.dropped_TK is None else int(routing.dropped_TK.sum())
        (y_BTD.square().mean() + 0.1 * loss).backward()
        found.append([y_BTD, loss, leaf_BTD.grad])
    assert (drops > 0) == (factor is not None and factor < 2)
    gradients = [part(theirs, name, lambda weight: weight.grad) for name in ("gate", "gate_up", "down")]
    torch.testing.assert_close([*found[1], *(weight.grad for weight in weights(ours))], [*found[0], *gradients])


def test_evaluation_draws_a_second_expert_there_and_not_here() -> None:
    theirs, ours = both(2, None)
    theirs.deepspeed_moe.gate.top2_2nd_expert_sampling = True
    x_BTD = torch.randn(1, 64, HIDDEN)
    torch.manual_seed(0)
    with torch.no_grad():
        one, two = (theirs.eval()(x_BTD)[0] for _ in range(2))
        assert not torch.allclose(one, two)
        assert torch.equal(ours.eval()(x_BTD), ours(x_BTD))


def test_fewer_tokens_than_slots_are_refused_there_and_not_here() -> None:
    """Their top-1 gate asserts as many tokens as `min_capacity`; a last batch or one decoded token has fewer."""
    theirs, ours = both(1, 1.0)
    x_BTD = torch.randn(1, 3, HIDDEN)
    with pytest.raises(AssertionError, match="min_capacity"):
        theirs(x_BTD)
    assert ours(x_BTD).isfinite().all()
