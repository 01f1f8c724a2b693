"""The native CPU kernel against `loop`, on every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesaic.layer.kernels import ExpertWeights, run_experts
from moesaic.layer.kernels.activation import FusedActivation
from moesaic.layer.kernels.native import library

pytestmark = pytest.mark.skipif(library.load() is None, reason="native kernels were not built: no C compiler")

ACTIVATIONS = {
    "silu": FusedActivation("silu", gated=True),
    "gelu": FusedActivation("gelu", gated=True),
    "gelu_tanh": FusedActivation("gelu_tanh", gated=False),
    "relu": FusedActivation("relu", gated=True),
    "relu2": FusedActivation("relu2", gated=False),
    "clamped": FusedActivation("clamped_swiglu", gated=True, alpha=1.702, limit=0.5),
    "interleaved": FusedActivation("clamped_swiglu", gated=True, interleaved=True, alpha=1.702, limit=0.5),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make_weights(
    fused: FusedActivation, dtype: torch.dtype, n: int = 5, d: int = 77, f: int = 45, *, bias: bool = False
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)
    h = 2 * f if fused.gated else f

    def normal(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * size[-1] ** -0.5).to(dtype)

    biases = (normal(n, h) * 3, normal(n, d) * 3) if bias else (None, None)
    return ExpertWeights(normal(n, h, d), normal(n, d, f), fused, *biases, fused=fused)


def both(weights: ExpertWeights, x_TD: Tensor, index_TK: Tensor) -> tuple[Tensor, Tensor]:
    weight_TK = torch.rand(index_TK.shape, generator=torch.Generator().manual_seed(2)) + 0.1
    return (
        run_experts("native", weights, x_TD, index_TK, weight_TK),
        run_experts("loop", weights, x_TD, index_TK, weight_TK),
    )


def tokens(count: int, dtype: torch.dtype, d: int = 77) -> Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("count", [1, 4, 300])
def test_forward_equals_loop(isa: str, activation: str, dtype: torch.dtype, count: int) -> None:
    fused = ACTIVATIONS[activation]
    weights = make_weights(fused, dtype, bias=activation in ("clamped", "interleaved", "relu2"))
    index_TK = torch.randint(0, 6, (count, 2), generator=torch.Generator().manual_seed(3))  # 5 is no expert
    actual_TD, expected_TD = both(weights, tokens(count, dtype), index_TK)
    # `loop` rounds after every operation, so single small values differ by more than their own size suggests.
    atol = TOLERANCE[dtype] * expected_TD.abs().max().item()
    torch.testing.assert_close(actual_TD, expected_TD, rtol=0, atol=atol)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("count", [130, 40])
def test_rows_as_columns_equal_loop_forward_and_backward(isa: str, activation: str, count: int) -> None:
    """bfloat16 and multiples of 16: experts with 3, 16, 21, 69 and more rows, in whole vectors and left over."""
    fused = ACTIVATIONS[activation]
    weights = make_weights(
        fused, torch.bfloat16, n=6, d=96, f=48, bias=activation in ("clamped", "interleaved", "relu2")
    )
    parameters = [weights.up_NHD, weights.down_NDF, weights.up_bias_NH, weights.down_bias_ND]
    leaves = [
        tensor.requires_grad_() for tensor in (tokens(count, torch.bfloat16, 96), *parameters) if tensor is not None
    ]
    first = torch.arange(count).clamp(max=70).sub(50).clamp(min=0).sign()  # 51 tokens for expert 0
    second = torch.arange(count).remainder(25).clamp(max=4) + 2  # three of expert 2, 3, 4 to each 25, the others to 6
    index_TK = torch.stack([first, second], dim=1)
    weight_TK = (torch.rand(index_TK.shape, generator=torch.Generator().manual_seed(2)) + 0.1).requires_grad_()
    upstream_TD = tokens(count, torch.bfloat16, 96).flip(0)
    results = {}
    for kernel in ("native", "loop"):
        y_TD = run_experts(kernel, weights, leaves[0], index_TK, weight_TK)
        results[kernel] = (y_TD, *torch.autograd.grad(y_TD, [*leaves, weight_TK], upstream_TD))
    for actual, expected in zip(results["native"], results["loop"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2 * expected.abs().max().item())


def test_rows_longer_than_a_cache_block(isa: str) -> None:
    weights = make_weights(ACTIVATIONS["silu"], torch.float32, n=2, d=2100, f=1100)
    actual_TD, expected_TD = both(weights, tokens(7, torch.float32, 2100), torch.tensor([[0, 1]] * 7))
    torch.testing.assert_close(actual_TD, expected_TD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 37])
def test_extreme_activations_stay_finite(isa: str, count: int) -> None:
    weights = make_weights(ACTIVATIONS["silu"], torch.float32)
    actual_TD, expected_TD = both(weights, 1e4 * tokens(count, torch.float32), torch.zeros(count, 1, dtype=torch.int64))
    torch.testing.assert_close(actual_TD, expected_TD, rtol=1e-4, atol=1e-4 * expected_TD.abs().max().item())


def test_tokens_without_experts_may_hold_nan() -> None:
    weights = make_weights(ACTIVATIONS["silu"], torch.float32)
    x_TD = tokens(3, torch.float32)
    x_TD[1] = torch.nan
    actual_TD, _ = both(weights, x_TD, torch.tensor([[0, 5], [5, 5], [2, 1]]))
    assert actual_TD.isfinite().all()
    assert actual_TD[1].eq(0).all()


def test_input_and_weights_may_be_slices() -> None:
    fused = ACTIVATIONS["silu"]
    whole = make_weights(fused, torch.float32, n=6)
    part = ExpertWeights(whole.up_NHD[1:4, :, :40], whole.down_NDF[1:4, :40], fused, fused=fused)
    index_TK = torch.tensor([[0, 2], [1, 2]])
    actual_TD, expected_TD = both(part, tokens(2, torch.float32)[:, 20:60], index_TK)
    torch.testing.assert_close(actual_TD, expected_TD, rtol=1e-5, atol=1e-5)


def test_threads_do_not_change_a_bit() -> None:
    weights = make_weights(ACTIVATIONS["silu"], torch.float32)
    index_TK = torch.randint(0, 5, (200, 2), generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(both(weights, tokens(200, torch.float32), index_TK)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_index_out_of_range_is_named() -> None:
    weights = make_weights(ACTIVATIONS["silu"], torch.float32)
    with pytest.raises(IndexError, match=r"picks must be in \[0, 5\], got 0 to 6"):
        run_experts("native", weights, tokens(1, torch.float32), torch.tensor([[0, 6]]), torch.ones(1, 2))


def test_op_passes_torch_opcheck() -> None:
    weights = make_weights(ACTIVATIONS["silu"], torch.float32)
    index_TK, weight_TK = torch.tensor([[0, 1]]), torch.ones(1, 2)
    arguments = (tokens(1, torch.float32), weights.up_NHD, weights.down_NDF, None, None, index_TK, weight_TK)
    torch.library.opcheck(
        torch.ops.moesaic.native_experts.default,
        (*arguments, 0, True, False, 0.0, 0.0, False),
        test_utils=("test_schema", "test_faketensor"),
    )
