"""Order and restore: a permutation, and a weighted sum that equals the dense formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.layer import order, restore


@st.composite
def picks(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Any picks, the sentinel N among them; experts may repeat within a token and may stay empty."""
    num_experts = draw(st.integers(1, 6))
    shape = draw(st.integers(0, 8)), draw(st.integers(1, 4))
    values = draw(st.lists(st.integers(0, num_experts), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return torch.tensor(values, dtype=torch.int64).view(shape), num_experts


@given(picks())
@settings(deadline=None)
def test_order_is_a_stable_permutation_with_sentinels_last(case: tuple[Tensor, int]) -> None:
    index_TK, num_experts = case
    by_expert = order(index_TK, num_experts)
    flat = index_TK.flatten().tolist()
    assert by_expert.pick_S.tolist() == sorted(range(len(flat)), key=flat.__getitem__)  # Python's sort is stable
    assert by_expert.row_S[by_expert.pick_S].tolist() == list(range(len(flat)))
    assert by_expert.counts_N.tolist() == [flat.count(expert) for expert in range(num_experts)]
    assert by_expert.token_S.tolist() == [pick // index_TK.shape[1] for pick in by_expert.pick_S.tolist()]
    routed = int(by_expert.counts_N.sum())
    assert all(flat[pick] == num_experts for pick in by_expert.pick_S[routed:].tolist())


@given(picks(), st.integers(0, 2**31 - 1))
@settings(deadline=None)
def test_restore_equals_the_dense_weighted_sum(case: tuple[Tensor, int], seed: int) -> None:
    index_TK, num_experts = case
    generator = torch.Generator().manual_seed(seed)
    weight_TK = torch.randn(index_TK.shape, generator=generator, dtype=torch.float64)
    # Expert e maps every token to row e of a table; the sentinel's row is zero.
    table_ND = torch.randn(num_experts + 1, 3, generator=generator, dtype=torch.float64)
    table_ND[num_experts] = 0
    by_expert = order(index_TK, num_experts)
    y_TD = restore(table_ND[index_TK.flatten()[by_expert.pick_S]], by_expert, weight_TK)
    expected_TD = torch.zeros(index_TK.shape[0], 3, dtype=torch.float64)
    for token, row in enumerate(index_TK.tolist()):
        for pick, expert in enumerate(row):
            expected_TD[token] += weight_TK[token, pick] * table_ND[expert]
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_restore_keeps_the_dtype_of_the_rows(dtype: torch.dtype) -> None:
    index_TK = torch.tensor([[1, 0], [2, 1]])
    y_TD = restore(torch.ones(4, 3, dtype=dtype), order(index_TK, 2), torch.ones(2, 2))
    assert y_TD.dtype == dtype


def test_restore_adds_bfloat16_rows_in_float32() -> None:
    # 256 + 1 is lost in bfloat16 at each step but not in float32: 256 + 1 + 1 rounds to 258, which bfloat16 holds.
    rows_SD = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    y_TD = restore(rows_SD, order(torch.tensor([[0, 1, 2]]), 3), torch.ones(1, 3))
    assert y_TD.item() == 258
