"""Inputs are the same for the same seed, and as the page says they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moesaic.bench import Cell, Shape, inputs
from moesaic.bench.inputs import Layers, number_of_sets, picks

CELL = Cell("decode", Shape(16, 8, 32, 4), "f32", 2, 1, "balanced", "cpu")


def test_inputs_repeat() -> None:
    one, other = Layers(3).inputs(CELL).calls[0], Layers(3).inputs(CELL).calls[0]
    for name in ("x_TD", "index_TK", "weight_TK", "upstream_TD"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(one.weights.up_NHD, other.weights.up_NHD)
    assert not torch.equal(one.weights.up_NHD, Layers(4).inputs(CELL).calls[0].weights.up_NHD)


def test_picks_are_different_experts_with_weights_that_sum_to_one() -> None:
    index_TK, weight_TK = picks(replace(CELL, tokens=50), torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 4 for row in index_TK.tolist())
    torch.testing.assert_close(weight_TK.sum(-1), torch.ones(50))


def test_skewed_picks_load_few_experts() -> None:
    def largest_share(routing: str) -> float:
        index_TK, _ = picks(replace(CELL, tokens=500, routing=routing), torch.Generator().manual_seed(0))
        return float(index_TK.flatten().bincount(minlength=32).max() / index_TK.numel())

    assert largest_share("balanced") < 1.5 / 32
    assert largest_share("skewed") > 3 / 32


def test_cold_cases_read_four_times_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "cache_bytes", lambda device: 10_000)
    # An expert has 3 * 16 * 8 * 4 = 1536 bytes; 8 touched: 12288 a call, so 40000 take 4 calls.
    assert number_of_sets(CELL, touched=8) == 4
    monkeypatch.setattr(inputs, "MOST_WEIGHT_BYTES", 2 * 32 * 1536)
    assert number_of_sets(CELL, touched=8) == 2
    monkeypatch.setattr(inputs, "MOST_WEIGHT_BYTES", 1)
    assert number_of_sets(CELL, touched=8) == 1


def test_touched_experts_are_counted_over_the_calls_that_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "cache_bytes", lambda device: 10_000)
    found = Layers(0).inputs(CELL)
    assert len(found.calls) > 1
    assert found.touched == sum(len(call.index_TK.unique()) for call in found.calls) / len(found.calls)
