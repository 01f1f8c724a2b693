"""Memory of large gradients is used again by the next step, never while anybody can see it, and let go with the weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from moesaic.layer.kernels.activation import FusedActivation
from moesaic.layer.kernels.native import experts, kept, library
from moesaic.layer.kernels.weights import ExpertWeights

pytestmark = pytest.mark.skipif(library.load() is None, reason="native kernels were not built: no C compiler")

SWIGLU = FusedActivation("silu", gated=True)
N, D, F, T = 4, 1024, 1032, 3


def make_weights() -> ExpertWeights:
    """The gradient of `up` is just large enough to be kept, that of `down` is not."""
    torch.manual_seed(0)
    up_NHD, down_NDF = nn.Parameter(torch.randn(N, 2 * F, D) * 0.03), nn.Parameter(torch.randn(N, D, F) * 0.03)
    assert up_NHD.nbytes >= kept.KEPT_FROM > down_NDF.nbytes
    return ExpertWeights(up_NHD, down_NDF, SWIGLU, fused=SWIGLU)


def step(weights: ExpertWeights, scale: float = 1.0) -> Tensor:
    """The gradient of `up`."""
    x_TD = torch.linspace(-1, 1, T * D).view(T, D)
    index_TK, weight_TK = torch.tensor([[0, 1], [1, 3], [0, 3]]), torch.full((T, 2), 0.5)
    (experts.run(weights, x_TD, index_TK, weight_TK) * scale).sum().backward()
    gradient = weights.up_NHD.grad
    assert gradient is not None
    return gradient


def test_a_gradient_that_was_let_go_gives_its_memory_to_the_next() -> None:
    weights = make_weights()
    first = step(weights)
    address, expected = first.data_ptr(), first.clone()
    del first
    weights.up_NHD.grad = None
    second = step(weights)
    assert second.data_ptr() == address
    assert torch.equal(second, expected)


def test_memory_that_somebody_sees_stays_as_it_is() -> None:
    weights = make_weights()
    expected = step(weights).clone()
    seen, weights.up_NHD.grad = weights.up_NHD.grad[1:2, 5], None
    assert torch.equal(step(weights, scale=2.0), 2 * expected)
    assert torch.equal(seen, expected[1:2, 5])


def test_a_second_backward_pass_adds_to_the_first() -> None:
    weights = make_weights()
    expected = step(weights).clone()
    torch.testing.assert_close(step(weights), 2 * expected)


def test_another_weight_of_the_same_size_takes_what_is_free() -> None:
    weights, others = make_weights(), make_weights()
    address = step(weights).data_ptr()
    weights.up_NHD.grad = None
    assert step(others).data_ptr() == address
    assert step(weights).data_ptr() != address


def test_memory_goes_with_the_weight_that_used_it_last() -> None:
    weights, others = make_weights(), make_weights()
    memory = StorageWeakRef(step(weights).untyped_storage())
    weights.up_NHD.grad = None
    step(others)
    others.up_NHD.grad = None
    del weights
    assert not memory.expired()
    del others
    assert memory.expired()
