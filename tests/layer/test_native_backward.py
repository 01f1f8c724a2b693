"""Gradients of the native CPU kernel against `loop`, and its packed product against torch, on every instruction set."""

from __future__ import annotations

import ctypes
import itertools
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.layer.kernels import ExpertWeights, run_experts
from moesaic.layer.kernels.activation import FusedActivation
from moesaic.layer.kernels.native import library

pytestmark = pytest.mark.skipif(library.load() is None, reason="native kernels were not built: no C compiler")

N, D, WIDTH = 5, 77, 45
ACTIVATIONS = {
    "silu": FusedActivation("silu", gated=True),
    "silu_plain": FusedActivation("silu", gated=False),
    "gelu": FusedActivation("gelu", gated=True),
    "gelu_plain": FusedActivation("gelu", gated=False),
    "gelu_tanh": FusedActivation("gelu_tanh", gated=True),
    "relu": FusedActivation("relu", gated=True),
    "relu2": FusedActivation("relu2", gated=False),
    "clamped": FusedActivation("clamped_swiglu", gated=True, alpha=1.702, limit=0.5),
    "interleaved": FusedActivation("clamped_swiglu", gated=True, interleaved=True, alpha=1.702, limit=0.5),
}
# Of the largest value, for sums that come out smaller than their terms.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
NAMES = ("x", "weight", "up", "down", "up_bias", "down_bias")


def make_weights(
    fused: FusedActivation, dtype: torch.dtype, *, bias: bool = True, d: int = D, f: int = WIDTH
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)
    h = 2 * f if fused.gated else f

    def normal(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * size[-1] ** -0.5).to(dtype).requires_grad_()

    biases = (normal(N, h), normal(N, d)) if bias else (None, None)
    return ExpertWeights(normal(N, h, d), normal(N, d, f), fused, *biases, fused=fused)


def make_input(count: int, dtype: torch.dtype, d: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """x_TD, index_TK with some picks of no expert, weight_TK."""
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(count, d, generator=generator).to(dtype).requires_grad_()
    index_TK = torch.randint(0, N + 1, (count, 2), generator=generator)
    weight_TK = (torch.rand(count, 2, generator=generator) + 0.1).requires_grad_()
    return x_TD, index_TK, weight_TK


def gradients(
    name: str, weights: ExpertWeights, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> dict[str, Tensor]:
    """Of every input that asks for one."""
    leaves = (x_TD, weight_TK, weights.up_NHD, weights.down_NDF, weights.up_bias_NH, weights.down_bias_ND)
    asked = {key: leaf for key, leaf in zip(NAMES, leaves, strict=True) if leaf is not None and leaf.requires_grad}
    y_TD = run_experts(name, weights, x_TD, index_TK, weight_TK)
    upstream_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(2)).to(y_TD.dtype)
    found = torch.autograd.grad(y_TD, list(asked.values()), upstream_TD, materialize_grads=True)
    return dict(zip(asked, found, strict=True))


def assert_equal_to_loop(weights: ExpertWeights, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> None:
    """Equal within float32 rounding; in 16 bits, at most twice as far from float64 as `loop` is."""
    actual = gradients("native", weights, x_TD, index_TK, weight_TK)
    expected = gradients("loop", weights, x_TD, index_TK, weight_TK)
    parts = (weights.up_NHD, weights.down_NDF, weights.up_bias_NH, weights.down_bias_ND)
    up, down, *biases = (None if t is None else t.detach().double().requires_grad_() for t in parts)
    assert up is not None
    assert down is not None
    wide = ExpertWeights(up, down, weights.activate, *biases, fused=weights.fused)
    exact = gradients("loop", wide, x_TD.detach().double().requires_grad_(), index_TK, weight_TK)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        largest, loop_error = _distances(value, exact[key])
        assert torch.isfinite(actual[key]).all()
        assert _distances(actual[key], exact[key])[1] <= 2 * loop_error + ROUNDING[x_TD.dtype] * largest, key


def _distances(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest value and largest difference."""
    if value.numel() == 0:
        return 0.0, 0.0
    return exact.abs().max().item(), (value.double() - exact.double()).abs().max().item()


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("count", [1, 4, 130])
def test_gradients_equal_loop(isa: str, activation: str, dtype: torch.dtype, count: int) -> None:
    weights = make_weights(ACTIVATIONS[activation], dtype, bias=activation != "silu")
    assert_equal_to_loop(weights, *make_input(count, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_and_features_than_a_block_holds(dtype: torch.dtype) -> None:
    weights = make_weights(ACTIVATIONS["silu"], dtype, d=530, f=600)
    x_TD, _, weight_TK = make_input(700, dtype, 530)
    index_TK = torch.tensor([[3, 1]] * 350 + [[3, N]] * 350)  # 700 rows of one expert, 350 of another
    assert_equal_to_loop(weights, x_TD, index_TK, weight_TK)


@pytest.mark.parametrize("threads", [1, 2])
def test_more_rows_than_a_batch_of_experts_holds(threads: int) -> None:
    """On one thread at most 910 rows: batches of experts 0 and 1, of 2 alone, of 3 and 4."""
    weights = make_weights(ACTIVATIONS["silu"], torch.float32, d=16, f=768)
    x_TD, _, weight_TK = make_input(1000, torch.float32, 16)
    index_TK = torch.tensor([[2, 1]] * 400 + [[2, N]] * 550 + [[3, 4]] * 50)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_equal_to_loop(weights, x_TD, index_TK, weight_TK)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("count", [3, 200])
@pytest.mark.parametrize("transposed", [(True, True), (True, False), (False, True)], ids=["both", "up", "down"])
@pytest.mark.parametrize("activation", ["silu", "interleaved", "relu2"])
def test_weights_stored_transposed(
    isa: str, activation: str, transposed: tuple[bool, bool], count: int, dtype: torch.dtype
) -> None:
    """Output and gradients, for few rows and for many; gradients have the layout of the weights."""
    plain = make_weights(ACTIVATIONS[activation], dtype)
    up, down = (
        weight.detach().mT.contiguous().mT.requires_grad_() if flip else weight
        for weight, flip in zip((plain.up_NHD, plain.down_NDF), transposed, strict=True)
    )
    weights = ExpertWeights(up, down, plain.activate, plain.up_bias_NH, plain.down_bias_ND, fused=plain.fused)
    inputs = make_input(count, dtype)
    assert_equal_to_loop(weights, *inputs)
    with torch.no_grad():
        actual_TD, expected_TD = (run_experts(name, weights, *inputs) for name in ("native", "loop"))
    atol = 8 * ROUNDING[dtype] * expected_TD.abs().max().item()
    torch.testing.assert_close(actual_TD, expected_TD, rtol=0, atol=atol)
    found = gradients("native", weights, *inputs)
    assert found["up"].stride() == up.stride()
    assert found["down"].stride() == down.stride()


@pytest.mark.parametrize("picks", [[[N, N]] * 3, [[2, 2]] * 40, [[0, N]]], ids=["no_rows", "one_expert", "one_row"])
def test_experts_without_rows_get_zero(picks: list[list[int]]) -> None:
    weights = make_weights(ACTIVATIONS["silu"], torch.float32)
    x_TD, _, weight_TK = make_input(len(picks), torch.float32)
    assert_equal_to_loop(weights, x_TD, torch.tensor(picks), weight_TK)
    used = {expert for row in picks for expert in row}
    up_grad = gradients("native", weights, x_TD, torch.tensor(picks), weight_TK)["up"]
    for expert in set(range(N)) - used:
        assert up_grad[expert].eq(0).all()


def test_no_tokens() -> None:
    weights = make_weights(ACTIVATIONS["silu"], torch.float32)
    assert_equal_to_loop(weights, *make_input(0, torch.float32))


def test_nan_in_tokens_of_no_expert_reaches_nothing() -> None:
    weights = make_weights(ACTIVATIONS["silu"], torch.float32)
    x_TD, _, weight_TK = make_input(4, torch.float32)
    with torch.no_grad():
        x_TD[1] = torch.nan
        weight_TK[2, 0] = torch.nan
    index_TK = torch.tensor([[0, N], [N, N], [N, 3], [0, 3]])
    found = gradients("native", weights, x_TD, index_TK, weight_TK)
    assert all(value.isfinite().all() for value in found.values())
    assert found["x"][1].eq(0).all()
    assert found["weight"][index_TK == N].eq(0).all()


@pytest.mark.parametrize("asked", [*itertools.combinations(NAMES, 1), ("x", "weight"), ("up", "down"), NAMES])
def test_only_what_is_asked_for_is_computed(asked: tuple[str, ...]) -> None:
    weights = make_weights(ACTIVATIONS["silu"], torch.float32)
    x_TD, index_TK, weight_TK = make_input(9, torch.float32)
    everything = gradients("native", weights, x_TD, index_TK, weight_TK)
    leaves = (x_TD, weight_TK, weights.up_NHD, weights.down_NDF, weights.up_bias_NH, weights.down_bias_ND)
    for key, leaf in zip(NAMES, leaves, strict=True):
        assert leaf is not None
        leaf.requires_grad_(key in asked)
    found = gradients("native", weights, x_TD, index_TK, weight_TK)
    assert set(found) == set(asked)
    assert all(torch.equal(found[key], everything[key]) for key in asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    weights = make_weights(ACTIVATIONS["silu"], dtype, d=200, f=100)
    inputs = make_input(700, dtype, 200)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7, 3):
            torch.set_num_threads(threads)
            results.append(gradients("native", weights, *inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(value, other[key]) for key, value in results[0].items())


def test_slices_of_weights_and_input() -> None:
    whole = make_weights(ACTIVATIONS["silu"], torch.float32, bias=False)
    x_TD, index_TK, weight_TK = make_input(20, torch.float32)
    found = {}
    for name in ("native", "loop"):
        part = ExpertWeights(whole.up_NHD[1:4, :, 3:43], whole.down_NDF[1:4, 20:60], whole.activate, fused=whole.fused)
        y_TD = run_experts(name, part, x_TD[:, 30:70], index_TK.clamp(max=3), weight_TK)
        found[name] = torch.autograd.grad(y_TD.square().sum(), (x_TD, weight_TK, whole.up_NHD, whole.down_NDF))
    torch.testing.assert_close(found["native"], found["loop"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit(reentrant: bool) -> None:
    weights = make_weights(ACTIVATIONS["silu"], torch.float32)
    x_TD, index_TK, weight_TK = make_input(30, torch.float32)
    leaves = (x_TD, weight_TK, weights.up_NHD, weights.down_NDF)

    def layer(x_TD: Tensor, weight_TK: Tensor, up_NHD: Tensor, down_NDF: Tensor) -> Tensor:
        packed = ExpertWeights(up_NHD, down_NDF, weights.activate, fused=weights.fused)
        return run_experts("native", packed, x_TD, index_TK, weight_TK)

    found = []
    for run in (layer, partial(checkpoint, layer, use_reentrant=reentrant)):
        for leaf in leaves:
            leaf.grad = None
        run(*leaves).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_second_derivative_is_refused() -> None:
    weights = make_weights(ACTIVATIONS["silu"], torch.float32)
    x_TD, index_TK, weight_TK = make_input(6, torch.float32)
    y_TD = run_experts("native", weights, x_TD, index_TK, weight_TK)
    (gradient,) = torch.autograd.grad(y_TD.sum(), weights.down_NDF, create_graph=True)
    with pytest.raises(RuntimeError, match="native_experts_backward"):
        gradient.square().sum().backward()


def test_compiled_gradients_are_the_same() -> None:
    weights = make_weights(ACTIVATIONS["silu"], torch.float32)
    x_TD, index_TK, weight_TK = make_input(20, torch.float32)
    leaves = (x_TD, weight_TK, weights.up_NHD, weights.down_NDF, weights.up_bias_NH, weights.down_bias_ND)

    def layer(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return run_experts("native", weights, x_TD, index_TK, weight_TK)

    runs = (layer, torch.compile(layer, fullgraph=True, backend="aot_eager"))
    found = [torch.autograd.grad(run(x_TD, index_TK, weight_TK).square().sum(), leaves) for run in runs]  # type: ignore[arg-type]
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("fused", [ACTIVATIONS["silu"], ACTIVATIONS["interleaved"]], ids=["silu", "interleaved"])
def test_op_passes_torch_opcheck(fused: FusedActivation) -> None:
    weights = make_weights(fused, torch.float32)
    x_TD, index_TK, weight_TK = make_input(6, torch.float32)
    tensors = (x_TD, weights.up_NHD, weights.down_NDF, weights.up_bias_NH, weights.down_bias_ND, index_TK, weight_TK)
    code = (5, True, fused.interleaved, 1.702, 0.5)
    torch.library.opcheck(torch.ops.moesaic.native_experts.default, (*tensors, *code, True))
    with torch.no_grad():
        _, saved_SH = torch.ops.moesaic.native_experts(*tensors, *code, True)
    plain = tuple(t.detach() if t is not None else None for t in tensors)
    torch.library.opcheck(
        torch.ops.moesaic.native_experts_backward.default, (x_TD.detach(), *plain, saved_SH, *code, [True] * 6)
    )


class Operand(ctypes.Structure):
    """`moesaic_operand` of csrc/gemm.h, field by field."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_long),
        ("pick", ctypes.c_void_p),
        ("top_k", ctypes.c_long),
        ("first", ctypes.c_long),
        ("offset", ctypes.c_long),
        ("jump", ctypes.c_long),
        ("along_k", ctypes.c_int),
    )


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("along", list(itertools.product([0, 1], repeat=2)), ids=["TN", "TT", "NN", "NT"])
def test_packed_product_equals_torch(isa: str, along: tuple[int, int], dtype: torch.dtype) -> None:
    native = library.loaded()
    generator = torch.Generator().manual_seed(0)

    def operand(matrix: Tensor, along_k: int) -> Operand:
        return Operand(matrix.data_ptr(), matrix.stride(0) * matrix.element_size(), None, 1, 0, 0, 0, along_k)

    for m, n, k in ((1, 1, 1), (5, 7, 3), (12, 32, 16), (13, 33, 257), (290, 515, 513), (37, 100, 1025)):
        a, b = torch.randn(m, k, generator=generator).to(dtype), torch.randn(k, n, generator=generator).to(dtype)
        left, right = a if along[0] else a.t().contiguous(), b.t().contiguous() if along[1] else b
        actual = torch.full((m, n), torch.nan)
        status = native.moesaic_gemm(
            ctypes.c_int(library.DTYPES[dtype]),
            ctypes.byref(operand(left, along[0])),
            ctypes.c_long(m),
            ctypes.byref(operand(right, along[1])),
            ctypes.c_long(n),
            ctypes.c_long(k),
            ctypes.c_void_p(actual.data_ptr()),
        )
        assert status == 0
        # Sums in float32 of products that are exact in float64.
        torch.testing.assert_close(actual.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-6 * k**0.5 * 4)
