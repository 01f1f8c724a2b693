"""Peak memory of a step, in a process of its own."""

from __future__ import annotations

import sys

import pytest
import torch

from moesaic.bench import Cell, Options, Shape, run_bench
from moesaic.bench import run as runner
from moesaic.bench.memory import peak, reset_peak
from moesaic.bench.rates import Rates

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_the_peak_counts_what_was_freed_again() -> None:
    before = reset_peak("cpu")
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    assert 60 << 20 < peak("cpu") - before < 80 << 20
    assert peak("cpu") - reset_peak("cpu") > 50 << 20
    assert peak("cpu") - reset_peak("cpu") < 10 << 20


def test_a_step_holds_at_least_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "measure_rates", lambda dtype, device, quick: Rates(1e10, 1e11, "test"))
    shape = Shape(256, 256, 16, 2)
    cell = Cell("memory", shape, "f32", 64, 1, "balanced", "cpu")
    [result] = run_bench([cell], Options(only=("moesaic:grouped", "transformers:eager"))).results
    gradients = shape.experts * shape.expert_parameters * 4
    assert result.finished
    for row in result.rows:
        assert row.measured, row.reason
        assert row.median > gradients
    # Eager builds a full-size gradient of each projection per expert, beside the one it adds to.
    eager = result.measured("transformers:eager")
    assert eager is not None
    assert eager.median > 1.5 * gradients
