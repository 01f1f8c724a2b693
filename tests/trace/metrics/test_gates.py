from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import ConfigError
from moesaic.trace import (
    cross_layer_information,
    domain_information,
    expert_similarity,
    gate_entropy,
    inner_balance,
    outer_balance,
)


def test_domains_that_share_no_expert_tell_themselves_by_the_pick():
    loads = {"a": torch.tensor([10, 0, 0, 0]), "b": torch.tensor([0, 3, 0, 0]), "c": torch.tensor([0, 0, 1, 1])}
    assert domain_information(loads) == pytest.approx(math.log(3))


def test_domains_that_use_experts_alike_tell_nothing():
    assert domain_information({"a": torch.tensor([6, 2]), "b": torch.tensor([3, 1])}) == pytest.approx(0, abs=1e-12)
    assert domain_information({"a": torch.tensor([6, 2]), "b": torch.zeros(2, dtype=torch.int64)}) == 0


def test_domain_information_of_a_worked_example():
    # p = [[3/8, 1/8], [1/8, 3/8]]: log 2 - H(1/4).
    expected = math.log(2) - (0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert domain_information({"a": torch.tensor([3, 1]), "b": torch.tensor([25, 75])}) == pytest.approx(expected)


def test_equal_scores_in_distinct_bins_share_all_information():
    scores_TN = (torch.arange(16) / 16 + 0.005).unsqueeze(0)
    assert cross_layer_information(scores_TN, scores_TN) == pytest.approx(2.7726, abs=1e-4)


def test_a_flat_gate_shares_no_information():
    scores_TN = torch.rand(5, 16, generator=torch.Generator().manual_seed(0))
    flat_TN = torch.full((5, 16), 1 / 16)
    assert cross_layer_information(scores_TN, flat_TN) == pytest.approx(0, abs=1e-12)
    assert cross_layer_information(flat_TN, scores_TN) == pytest.approx(0, abs=1e-12)


@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 99))
def test_cross_layer_information_is_that_of_the_contingency_table(tokens: int, num_experts: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    first_TN, second_TN = (torch.rand(tokens, num_experts, generator=generator) for _ in range(2))
    expected = 0.0
    for first_N, second_N in zip((first_TN * 9).long(), (second_TN * 9).long(), strict=True):
        table = torch.zeros(10, 10, dtype=torch.float64)
        for first, second in zip(first_N, second_N, strict=True):
            table[first, second] += 1 / num_experts
        independent = table.sum(1, keepdim=True) * table.sum(0, keepdim=True)
        used = table > 0
        expected += float((table[used] * (table[used] / independent[used]).log()).sum()) / tokens
    assert cross_layer_information(first_TN, second_TN, bins=10) == pytest.approx(expected, abs=1e-9)


def test_layers_of_different_size_are_refused():
    with pytest.raises(ConfigError, match="is not the shape of first_TN"):
        cross_layer_information(torch.rand(3, 4), torch.rand(3, 5))


def test_gate_balance_of_a_worked_example():
    scores_TN = torch.tensor([[0.6, 0.2, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1], [0.5, 0.1, 0.3, 0.1]])
    assert inner_balance(scores_TN) == pytest.approx(5 / 3)
    assert outer_balance(scores_TN, 2) == pytest.approx(0.8)
    assert outer_balance(10 * scores_TN, 2) == pytest.approx(0.8)
    assert gate_entropy(torch.full((3, 8), 0.5)) == pytest.approx(math.log(8))
    assert gate_entropy(torch.eye(4)) == 0


def test_a_score_of_zero_gives_a_finite_balance():
    assert math.isfinite(inner_balance(torch.tensor([[1.0, 0.0, 0.0]])))


def test_unrelated_experts_are_alike_by_chance_only():
    generator = torch.Generator().manual_seed(0)
    gate_up_NHD = 0.02 * torch.randn(16, 2 * 448, 1280, generator=generator)
    down_NDF = 0.02 * torch.randn(16, 1280, 448, generator=generator)
    assert expert_similarity(gate_up_NHD, down_NDF) == pytest.approx(3 / 16, abs=0.01)


def test_equal_experts_reach_the_number_of_their_matrices():
    generator = torch.Generator().manual_seed(0)
    gate_up_NHD, down_NDF = (
        torch.randn(1, *shape, generator=generator).expand(4, -1, -1) for shape in [(6, 5), (5, 3)]
    )
    assert expert_similarity(gate_up_NHD, down_NDF) == pytest.approx(3)
    assert expert_similarity(gate_up_NHD[:, :3], down_NDF) == pytest.approx(2)
    assert expert_similarity(gate_up_NHD.repeat(1, 2, 1)[:, :9], down_NDF) == pytest.approx(4)
