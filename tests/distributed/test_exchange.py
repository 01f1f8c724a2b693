"""Experts on several ranks equal all experts in one process, forward and backward, whatever the exchange."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tests.distributed.spawn import Worlds
from tests.distributed.spread_experts import Case, most_picked, on_rank, one_process, own_part
from torch import Tensor


def assert_equal(ours: Tensor, theirs: Tensor, what: str) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda text: f"{what}: {text}")


def equal_one_process(cases: list[Case]) -> None:
    """Compare on every rank."""
    for case in cases:
        slots = most_picked(case) if case.exchange == "padded" else None
        expected, expected_grads = one_process(case, dist.get_rank())
        values, grads, mesh = on_rank(case, slots)
        for what, ours, theirs in zip(("y", "x.grad", "weight.grad"), values, expected, strict=True):
            assert_equal(ours, theirs, f"{what} of {case}")
        for name, ours in grads.items():
            assert_equal(ours, own_part(expected_grads[name], name, case, mesh), f"gradient of {name} of {case}")


RAGGED_2 = [
    Case((7, 5)),
    Case((0, 9)),
    Case((0, 0)),
    Case((6, 6), "one expert"),
    Case((5, 8), "some nothing"),
    Case((3, 2), "nothing"),
    Case((4, 4), "own rank"),
    Case((4, 4), "no picks"),
]
RAGGED_4 = [Case((5, 0, 9, 2)), Case((6, 6, 6, 6), "some nothing"), Case((1, 2, 3, 4), experts=4)]
PADDED = [
    Case((6, 6), exchange="padded"),
    Case((5, 5), "one expert", exchange="padded"),
    Case((5, 5), "some nothing", exchange="padded"),
    Case((0, 0), exchange="padded"),
]
GATHERED_2 = [
    Case((4, 4), exchange="all_gather"),
    Case((0, 7), "some nothing", exchange="all_gather"),
    Case((0, 0), exchange="all_gather"),
]
GATHERED_4 = [Case((3, 1, 0, 5), exchange="all_gather")]
TWO_STEPS = [
    Case((5, 0, 9, 2), nodes=2),
    Case((4, 4, 4, 4), "some nothing", nodes=4),
    Case((3, 2, 1, 4), "one expert", nodes=1),
    Case((4, 4, 4, 4), exchange="padded", nodes=2),
]
SPLIT_2 = [Case((5, 3), esp=2), Case((0, 4), "some nothing", esp=2), Case((0, 0), esp=2)]
SPLIT_4 = [
    Case((5, 0, 9, 2), esp=2),
    Case((4, 4, 4, 4), "one expert", esp=2),
    Case((4, 4, 4, 4), exchange="padded", esp=2),
    Case((3, 0, 2, 4), exchange="all_gather", esp=2),
    Case((3, 0, 2, 4), esp=4),
]


@pytest.mark.parametrize("cases", [RAGGED_2, PADDED, GATHERED_2, SPLIT_2], ids=["ragged", "padded", "gather", "split"])
def test_two_ranks_equal_one(worlds: Worlds, cases: list[Case]) -> None:
    worlds(2, equal_one_process, cases)


@pytest.mark.parametrize(
    "cases", [RAGGED_4, GATHERED_4, TWO_STEPS, SPLIT_4], ids=["ragged", "gather", "steps", "split"]
)
def test_four_ranks_equal_one(worlds: Worlds, cases: list[Case]) -> None:
    worlds(4, equal_one_process, cases)
