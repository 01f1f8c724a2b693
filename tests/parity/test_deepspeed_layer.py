"""DeepSpeed's MoE layer beside our block with the same weights: outputs, balance loss and every gradient.

Runs where DeepSpeed is installed, like `test_deepspeed_gates.py`.
"""

from __future__ import annotations

import pytest
import torch

from moesaic.layer import LoadBalancing, RoutingContext

pytest.importorskip("deepspeed.moe.layer")

from tests.parity.deepspeed_layer import EXPERTS, HIDDEN, both, part, weights


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
