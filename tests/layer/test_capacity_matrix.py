"""Every router with a capacity: it either works as the contract says, or is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from tests.layer.router_rows import LENGTH, ROUTERS, B, D, N
from tests.layer.test_router_matrix import make_context, make_input, make_router

from moesaic.errors import ConfigError
from moesaic.layer import (
    BaseRouterConfig,
    LayerLoad,
    LoadBalancing,
    MoEBlock,
    MoESpec,
    RouterConfig,
    TopKConfig,
    limit_capacity,
)

# Tight enough to drop something of every router.
CAPACITIES: dict[str, dict[str, Any]] = {
    "position": {},
    "first_choices": {"choice_order": "rank_first", "renormalize": True},
    "probability": {"policy": "probability", "scope": "batch", "renormalize": True},
    "weight": {"policy": "weight", "rounding": "nearest"},
    "batch_priority": {"policy": "batch_priority", "rounding": "floor"},
    "random": {"policy": "random", "rounding": "tutel"},
}


@pytest.fixture(params=ROUTERS)
def config(request: pytest.FixtureRequest) -> BaseRouterConfig:
    return TypeAdapter(RouterConfig).validate_python(ROUTERS[request.param].values)


def make_spec(config: BaseRouterConfig, capacity: dict[str, Any]) -> MoESpec:
    return MoESpec.from_dict(
        {
            "experts": {"num_experts": N, "intermediate_size": 4},
            "router": config.to_dict(),
            "capacity": {"factor": 0.2, "minimum": 1, **capacity},
        }
    )


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_router_with_capacity_works_or_is_refused(config: BaseRouterConfig, capacity: str) -> None:
    if config.refuses_capacity is not None:
        with pytest.raises(ConfigError, match=r"capacity = .* does not go with router"):
            make_spec(config, CAPACITIES[capacity])
        return
    spec = make_spec(config, CAPACITIES[capacity])
    assert spec.capacity is not None
    assert spec.may_skip
    assert spec.depends_on(training=True) >= config.depends_on(training=True)
    router = make_router(config, training=True)
    block = MoEBlock(spec, D, layer=0).double()
    block.gate.load_state_dict(router.state_dict())
    mask_BT = torch.ones(B, LENGTH, dtype=torch.bool)
    mask_BT[0, -2:] = False
    x_BTD, context = make_input().requires_grad_(), make_context(mask_BT=mask_BT)
    y_BTD = block(x_BTD, context)
    routing = context.records[0]
    assert routing.assignment is None  # which would run the experts without looking at the picks that are left

    free = router(make_input().view(-1, D), context)
    assert torch.equal(routing.choice_TK, free.choice_TK)
    groups = 1 if spec.capacity.scope == "batch" else B
    mask_GT = mask_BT.view(groups, -1)
    slots_G = spec.capacity.slots(mask_GT.sum(-1), N, free.top_k, training=True)
    excess = 0
    for group in range(groups):
        rows_T = torch.zeros(groups, B * LENGTH // groups, dtype=torch.bool)
        rows_T[group] = mask_GT[group]
        before, after = (LayerLoad.of(record, rows_T.flatten()) for record in (free, routing))
        assert torch.equal(after.load_N, before.load_N.clamp(max=int(slots_G[group])))
        excess += int((before.load_N - slots_G[group]).clamp(min=0).sum())
    assert routing.dropped_TK is not None
    assert routing.dropped_TK.sum() == excess
    # Other routers may spread their few picks so well that no expert is full.
    assert excess or not isinstance(config, TopKConfig) or config.top_k == 1
    assert not routing.weight_TK[routing.dropped_TK].any()

    losses_B = LoadBalancing(coefficient=1).per_sequence(routing, context)
    torch.testing.assert_close(losses_B, LoadBalancing(coefficient=1).per_sequence(free, context))
    (y_BTD.square().sum() + losses_B.sum()).backward()
    assert x_BTD.grad is not None
    assert x_BTD.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in block.parameters())

    again = limit_capacity(free, spec.capacity, context, training=True, layer=0)
    assert torch.equal(again.index_TK, routing.index_TK)
