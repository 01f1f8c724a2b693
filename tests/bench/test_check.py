"""The reference equals `loop` itself, and what is wrong is found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesaic.bench import Cell, Shape
from moesaic.bench.check import fault, reference
from moesaic.bench.contenders.base import LayerEntry
from moesaic.bench.inputs import Call, Layers
from moesaic.layer.kernels import loop

CELL = Cell("forward-backward", Shape(16, 8, 6, 2), "f32", 12, 1, "skewed", "cpu")


def run(call: Call) -> Tensor:
    return loop.run(call.weights, call.x_TD, call.index_TK, call.weight_TK)


@pytest.fixture
def call() -> Call:
    return Layers(0).inputs(CELL).calls[0]


def test_reference_is_loop_with_its_gradients(call: Call) -> None:
    expected = reference(CELL, call)
    y_TD = run(call)
    y_TD.backward(call.upstream_TD)
    torch.testing.assert_close(expected["output"], y_TD)
    for name, leaf in call.leaves.items():
        torch.testing.assert_close(expected[name], leaf.grad)


def test_an_outcome_that_is_right(call: Call) -> None:
    outcome = LayerEntry(CELL, [call], run).outcome()
    assert outcome is not None
    assert fault(outcome, reference(CELL, call), torch.float32) is None


@pytest.mark.parametrize("name", ["output", "x", "weight", "up", "down"])
def test_one_wrong_number_is_found(call: Call, name: str) -> None:
    expected = reference(CELL, call)
    outcome = {key: value.clone() for key, value in expected.items()}
    outcome[name].view(-1)[-1] += 1
    assert f"{name} is " in str(fault(outcome, expected, torch.float32))
    outcome[name].view(-1)[-1] = torch.nan
    assert f"{name} is nan away" in str(fault(outcome, expected, torch.float32))
    del outcome[name]
    assert fault(outcome, expected, torch.float32) == f"gives no {name}"


def test_a_gradient_that_never_comes(call: Call) -> None:
    entry = LayerEntry(CELL, [call], lambda call: run(call).detach().requires_grad_())
    with pytest.raises(RuntimeError, match="no gradient of x, weight, up, down"):
        entry.outcome()
