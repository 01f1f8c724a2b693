"""Pairs of tokens and ranks: each once, in order, and sums in a fixed order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.dist.exchange.padded import padded_pairs
from moesaic.dist.exchange.pairs import Pairs
from moesaic.dist.exchange.ragged import Ragged


def with_zero(rows_SX: Tensor) -> Tensor:
    return torch.cat([rows_SX, rows_SX.new_zeros(1, rows_SX.shape[1])])


@st.composite
def picked(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """index_TK, N and the number of ranks."""
    size, share = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    tokens, top_k = draw(st.integers(0, 7)), draw(st.integers(0, 4))
    picks = st.lists(st.integers(0, size * share), min_size=tokens * top_k, max_size=tokens * top_k)
    return torch.tensor(draw(picks), dtype=torch.int64).view(tokens, top_k), size * share, size


@settings(max_examples=80)
@given(picked())
def test_each_pair_once(case: tuple[Tensor, int, int]) -> None:
    index_TK, experts, size = case
    tokens, share = index_TK.shape[0], experts // size
    expected = [
        (rank, token)
        for rank in range(size)
        for token in range(tokens)
        if any(pick // share == rank for pick in index_TK[token].tolist())
    ]
    ragged = Ragged(index_TK, experts, size)
    assert ragged.sent_P.tolist() == [sum(rank == at for at, _ in expected) for rank in range(size)]
    pairs = ragged.pairs(len(expected))
    x_TX = torch.arange(1.0, tokens + 1).unsqueeze(-1)
    assert pairs.spread(x_TX).flatten().tolist() == [token + 1 for _, token in expected]
    check_sums(pairs, expected, tokens)

    even = padded_pairs(index_TK, experts, size, tokens)
    blocks_PBX = even.spread(x_TX).view(size, tokens, 1)
    for rank, block in enumerate(blocks_PBX):
        own = [token + 1 for at, token in expected if at == rank]
        assert block.flatten().tolist() == own + [0] * (tokens - len(own))
    place = dict.fromkeys(expected, 0)
    for number, pair in enumerate(expected):
        rank = pair[0]
        place[pair] = rank * tokens + sum(other[0] == rank for other in expected[:number])
    values = torch.zeros(size * tokens, 1)
    values[[place[pair] for pair in expected]] = torch.ones(len(expected), 1)
    copies = [sum(at == token for _, at in expected) for token in range(tokens)]
    assert even.collect(with_zero(values)).flatten().tolist() == copies


def check_sums(pairs: Pairs, expected: list[tuple[int, int]], tokens: int) -> None:
    """Each token's rows are added in the order of their ranks, in float32 for bfloat16."""
    rows_SX = torch.linspace(-3, 3, len(expected)).unsqueeze(-1).bfloat16()
    sums = [torch.zeros(1) for _ in range(tokens)]
    for row, (_, token) in enumerate(expected):
        sums[token] = sums[token] + rows_SX[row].float()
    total = torch.stack(sums).bfloat16() if tokens else rows_SX.new_zeros(0, 1)
    assert pairs.collect(with_zero(rows_SX)).bfloat16().equal(total)


def test_more_than_the_capacity_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="more tokens for a rank than its capacity"):
        padded_pairs(torch.zeros(3, 1, dtype=torch.int64), 4, 2, 2)
