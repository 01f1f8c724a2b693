"""Every kernel against `loop` in float64, forward and backward, on the inputs that break kernels.

The rows come from the registry: see tests/layer/kernels/cases.py.
"""

from __future__ import annotations

import functools

import pytest
import torch
from tests.layer.kernels.cases import (
    AT_CLAMPS,
    LAYOUTS,
    LOOP,
    PICKS,
    SIZES,
    TOLERANCE,
    assert_close,
    make_call,
    runs,
)
from torch import Tensor

from moesaic.layer.kernels import ExpertWeights, Kernel


@functools.cache
def expected_results(layout: str, picks: str, size: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return make_call(layout, picks, size, dtype, exact=True).results(LOOP)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("picks", PICKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "device", "dtype"), runs())
def test_kernel_equals_loop_forward_and_backward(
    kernel: Kernel, device: str, dtype: torch.dtype, layout: str, picks: str, size: str
) -> None:
    call = make_call(layout, picks, size, dtype, device)
    call.skip_unless(kernel)
    expected = expected_results(layout, picks, size, dtype)
    actual = {name: tensor.cpu() for name, tensor in call.results(kernel).items()}
    clamps = "clamped" in layout
    assert_close(actual, expected, TOLERANCE[dtype], AT_CLAMPS.get(dtype) if clamps else None)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("picks", PICKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "device", "dtype"), runs())
def test_kernel_equals_loop_without_a_graph(
    kernel: Kernel, device: str, dtype: torch.dtype, layout: str, picks: str, size: str
) -> None:
    """Kernels keep and compute less where no backward pass follows, so this is another path."""
    with torch.no_grad():
        call = make_call(layout, picks, size, dtype, device)
        call.skip_unless(kernel)
        actual = call.output(kernel)
    assert actual.dtype == dtype
    assert_close({"y": actual.cpu()}, {"y": expected_results(layout, picks, size, dtype)["y"]}, TOLERANCE[dtype])


@pytest.mark.parametrize(("kernel", "device", "dtype"), runs())
def test_rows_of_no_expert_add_nothing_even_if_they_hold_nan(kernel: Kernel, device: str, dtype: torch.dtype) -> None:
    call = make_call("silu_gated", "nan_in_rows_of_sentinels", "larger", dtype, device)
    call.skip_unless(kernel)
    nobody_T = (call.index_TK == call.weights.num_experts).all(-1)
    assert nobody_T.any()
    assert call.x_TD[nobody_T].isnan().all()
    found = call.results(kernel)
    assert not found["y"][nobody_T].any()
    assert not found["x"][nobody_T].any()
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("picks", ["no_rows", "no_tokens"])
@pytest.mark.parametrize(("kernel", "device", "dtype"), runs())
def test_experts_without_rows_have_gradients_of_zero(
    kernel: Kernel, device: str, dtype: torch.dtype, picks: str
) -> None:
    """Not none at all: where experts are spread, all ranks must reduce the same gradients."""
    call = make_call("gelu_gated_biased", picks, "larger", dtype, device)
    call.skip_unless(kernel)
    y_TD = call.output(kernel)
    gradients = torch.autograd.grad(
        y_TD, list(call.leaves.values()), call.upstream_TD.to(y_TD.dtype), allow_unused=True
    )
    for name, gradient in zip(call.leaves, gradients, strict=True):
        assert gradient is not None, name
        assert not gradient.any(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loop_equals_one_expert_at_a_time(layout: str) -> None:
    """The specification itself, against the formula written for one token and one pick."""
    call = make_call(layout, "some_sentinels", dtype=torch.float64)
    weights, expected_TD = call.weights, torch.zeros_like(call.x_TD)
    for token, row in enumerate(call.index_TK.tolist()):
        for pick, expert in enumerate(row):
            if expert == weights.num_experts:
                continue
            up_H = weights.up_NHD[expert] @ call.x_TD[token]
            up_H = up_H if weights.up_bias_NH is None else up_H + weights.up_bias_NH[expert]
            down_D = weights.down_NDF[expert] @ weights.activate(up_H)
            down_D = down_D if weights.down_bias_ND is None else down_D + weights.down_bias_ND[expert]
            expected_TD[token] += call.weight_TK[token, pick] * down_D
    torch.testing.assert_close(call.output(LOOP), expected_TD)


def test_loop_passes_gradcheck_twice() -> None:
    call = make_call("gelu_gated_biased", "single_token", dtype=torch.float64)

    def function(*tensors: Tensor) -> Tensor:
        x_TD, weight_TK, up, down, up_bias, down_bias = tensors
        packed = ExpertWeights(up, down, call.weights.activate, up_bias, down_bias)
        return LOOP.run(packed, x_TD, call.index_TK, weight_TK)

    leaves = tuple(call.leaves.values())
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
