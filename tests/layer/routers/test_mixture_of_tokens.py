"""Mixture of tokens: worked numbers, groups against plain loops, padding, what it depends on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer import Experts, ExpertsConfig, MixtureOfTokensConfig, MixtureOfTokensRouter, RoutingContext
from moesaic.layer.assignment import group_across, ungroup_across


def make_router(num_experts: int, **fields: Any) -> MixtureOfTokensRouter:
    """A router with identity weights, in float64: its input is its logits."""
    router = MixtureOfTokensConfig.from_dict(fields).build(num_experts, num_experts).double()
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


def test_shares_are_a_softmax_over_the_tokens_at_one_position() -> None:
    """Two sequences of two tokens; expert 0 sees 1:3 and 2:2, expert 1 sees 4:1 and 1:1 (arXiv 2310.15961, 3.1)."""
    x_TN = torch.tensor([[1.0, 4.0], [2.0, 1.0], [3.0, 1.0], [2.0, 1.0]], dtype=torch.float64).log()
    routing = make_router(2)(x_TN, RoutingContext(batch_size=2))
    expected_TN = torch.tensor([[0.25, 0.8], [0.5, 0.5], [0.75, 0.2], [0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(routing.weight_TK, expected_TN)
    assert routing.index_TK.tolist() == [[0, 1]] * 4


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_groups_hold_neighbouring_sequences_at_one_position(size: int) -> None:
    batch, length = 5, 3
    values_TX = torch.arange(batch * length).unsqueeze(-1) + 1
    groups = [
        [sequence * length + position + 1 for sequence in range(first, min(first + size, batch))]
        for first in range(0, batch, size)
        for position in range(length)
    ]
    grouped = group_across(values_TX, batch, size)
    assert [[value for value in row if value] for row in grouped.squeeze(-1).tolist()] == groups
    assert grouped.shape == (len(groups), size, 1)
    assert torch.equal(ungroup_across(grouped, batch, batch * length), values_TX)


@pytest.mark.parametrize("size", [None, 1, 2, 3])
def test_output_equals_a_loop_over_groups_with_padding(size: int | None) -> None:
    torch.manual_seed(0)
    batch, length, width, count = 5, 4, 6, 3
    experts = Experts(ExpertsConfig(num_experts=count, intermediate_size=5), width).double()
    experts.reset_parameters(std=1.0)
    config = MixtureOfTokensConfig(group_size=size)
    router = config.build(width, count).double()
    router.reset_parameters(std=1.0)
    x_BLD = torch.randn(batch, length, width, dtype=torch.float64)
    mask_BL = torch.rand(batch, length) < 0.7
    x_BLD[~mask_BL] = 1e3
    routing = router(x_BLD.flatten(0, 1), RoutingContext(batch_size=batch, mask_T=mask_BL.flatten()))
    assert routing.assignment is not None
    y_BLD = routing.assignment.run(experts, x_BLD.flatten(0, 1)).view(batch, length, width)

    def expert_output(x_D: Tensor, expert: int) -> Tensor:
        one = torch.ones(1, 1, dtype=torch.float64)
        return experts(x_D.unsqueeze(0), torch.full((1, 1), expert), one).squeeze(0)

    step = size or batch
    for first in range(0, batch, step):
        for position in range(length):
            members = [row for row in range(first, min(first + step, batch)) if mask_BL[row, position]]
            expected = {row: torch.zeros(width, dtype=torch.float64) for row in members}
            for expert in range(count):
                if not members:
                    continue
                logits = torch.stack([x_BLD[row, position] @ router.weight[expert] for row in members])
                shares = logits.softmax(0)
                mix_D = sum(share * x_BLD[row, position] for share, row in zip(shares, members, strict=True))
                for share, row in zip(shares, members, strict=True):
                    expected[row] = expected[row] + share * expert_output(mix_D, expert)  # type: ignore[arg-type]
            for row in range(first, min(first + step, batch)):
                found = y_BLD[row, position]
                torch.testing.assert_close(found, expected.get(row, torch.zeros_like(found)))


def test_facts() -> None:
    config = MixtureOfTokensConfig()
    for training in (False, True):
        assert config.depends_on(training) == {"other_sequences"}
    assert config.unservable == "the routing of a token depends on other sequences"
    assert config.runs_all_experts
    assert make_router(4, group_size=8).picks == 0.5


def test_bad_configuration_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^group_size = 0 is not valid"):
        MixtureOfTokensConfig.from_dict({"group_size": 0})
