"""The Triton kernel against `loop`: on a GPU if there is one, else in Triton's interpreter.

tests/conftest.py switches the interpreter on. It checks numbers, not compilation (test_triton_compile.py) and not speed,
and is slow: only on a GPU the kernel also runs through the matrix of all kernels (tests/layer/test_kernels.py).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.layer.kernels import cases
from tests.layer.kernels.cases import AT_CLAMPS, KERNELS, LAYOUTS, LOOP, PICKS, TOLERANCE, assert_close, make_call
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.errors import UnsupportedKernel
from moesaic.layer import Experts, ExpertsConfig
from moesaic.layer.kernels import Case, run_experts, select
from moesaic.layer.kernels import triton as kernel

DEVICE = cases.DEVICES[-1]
TRITON = next(each for each in KERNELS if each.name == "triton")
FEW_LAYOUTS = ["silu_gated", "gelu_tanh_plain_biased", "clamped_biased", "clamped_interleaved_transposed_biased"]

decode, schedule, tiles = (
    pytest.importorskip(f"moesaic.layer.kernels.triton.{name}", reason="needs Triton, which is not installed")
    for name in ("decode", "schedule", "tiles")
)


@pytest.fixture(autouse=True)
def _mended_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps bfloat16 as integers and would multiply those."""
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def values(handle: Any) -> Any:
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot_of_values(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, *(map(values, (a, b)) if a.dtype.scalar == tl.bfloat16 else (a, b)), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot_of_values)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that every loop and every mask is used at small sizes."""
    monkeypatch.setattr(tiles, "block_rows", lambda *_: 16)
    monkeypatch.setattr(tiles, "choose", lambda *_: tiles.Tile(16, 32, 16, 4, 2))


def compare(layout: str, picks: str, size: str, dtype: torch.dtype = torch.float32) -> None:
    expected = make_call(layout, picks, size, dtype, exact=True).results(LOOP)
    found = make_call(layout, picks, size, dtype, DEVICE).results(TRITON)
    clamps = AT_CLAMPS.get(dtype) if "clamped" in layout else None
    assert_close({name: tensor.cpu() for name, tensor in found.items()}, expected, TOLERANCE[dtype], clamps)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_loop_for_every_layout(layout: str) -> None:
    compare(layout, "some_sentinels", "tiny")


@pytest.mark.parametrize("picks", PICKS)
@pytest.mark.parametrize("layout", ["silu_gated", "gelu_tanh_plain_biased", "unknown_plain_biased"])
def test_equals_loop_for_all_picks(layout: str, picks: str) -> None:
    compare(layout, picks, "tiny")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", [*FEW_LAYOUTS, "relu_gated_transposed", "unknown_gate"])
@pytest.mark.parametrize("size", [cases.Size(4, 2, 72, 40, 25), cases.Size(4, 2, 64, 32, 25)], ids=["odd", "even"])
def test_equals_loop_with_many_tiles(layout: str, size: cases.Size, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.SIZES, "tiles", size)
    compare(layout, "some_sentinels", "tiles")


@pytest.mark.parametrize("layout", ["silu_gated", "gelu_tanh_plain_biased", "clamped_interleaved_transposed_biased"])
def test_equals_loop_with_one_large_tile(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tiles finish half of their columns at a time."""
    monkeypatch.setattr(tiles, "block_rows", lambda *_: 64)
    monkeypatch.setattr(tiles, "choose", lambda *_: tiles.Tile(64, 256, 64, 8, 4))
    monkeypatch.setitem(cases.SIZES, "wide", cases.Size(2, 2, 70, 190, 30))
    compare(layout, "some_sentinels", "wide")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", FEW_LAYOUTS)
def test_equals_loop_in_half_precision(layout: str, dtype: torch.dtype) -> None:
    compare(layout, "some_sentinels", "larger", dtype)


@pytest.mark.parametrize("tokens", [1, 9, 61], ids=["one", "few", "sorted"])
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("silu_gated", torch.bfloat16),
        ("gelu_tanh_plain_biased", torch.float32),
        ("clamped_interleaved_transposed_biased", torch.float32),
    ],
)
def test_inference_equals_loop(layout: str, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients few rows take another path, and many save nothing."""
    monkeypatch.setitem(cases.SIZES, "rows", replace(cases.SIZES["larger"], tokens=max(2, tokens)))
    picks = "single_token" if tokens == 1 else "some_sentinels"
    call = make_call(layout, picks, "rows", dtype, DEVICE)
    assert (call.index_TK.numel() <= decode.MAX_PICKS) == (tokens < 61)
    with torch.no_grad():
        found = {"y": call.output(TRITON).cpu()}
    assert_close(found, {"y": make_call(layout, picks, "rows", dtype, exact=True).output(LOOP)}, TOLERANCE[dtype])


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_combine_weights_of_no_expert_may_be_nan(grad: bool) -> None:
    call = make_call("clamped_biased", "nan_in_rows_of_sentinels", device=DEVICE)
    nobody_TK = call.index_TK == call.weights.num_experts
    with torch.no_grad():
        call.weight_TK[nobody_TK] = torch.nan
    if grad:
        found = call.results(TRITON)
        assert found["weight"][nobody_TK].eq(0).all()
    else:
        with torch.no_grad():
            found = {"y": call.output(TRITON)}
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_atomic_scatter_equals_the_ordered_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernel.SCATTER_VARIABLE, "atomic")
    compare("clamped_biased", "some_sentinels", "tiny")
    compare("silu_gated", "random", "tiny", torch.bfloat16)


def test_deterministic_algorithms_win_over_atomics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernel.SCATTER_VARIABLE, "atomic")
    assert kernel._adds_with_atomics()
    torch.use_deterministic_algorithms(True)
    try:
        assert not kernel._adds_with_atomics()
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setenv(kernel.SCATTER_VARIABLE, "fast")
    with pytest.raises(UnsupportedKernel, match=r"MOESAIC_TRITON_SCATTER = 'fast'.*sum or atomic"):
        kernel._adds_with_atomics()


@pytest.mark.parametrize("picks", ["random", "some_sentinels", "no_rows", "no_tokens"])
def test_parameters_of_unknown_activations_see_no_rows_of_no_expert(picks: str) -> None:
    def results(device: str, each: Any, exact: bool) -> dict[str, Tensor]:
        call = make_call("unknown_plain_biased", picks, device=device, exact=exact)
        slope = torch.tensor(0.7, dtype=call.x_TD.dtype, device=device, requires_grad=True)
        weights = replace(call.weights, activate=lambda rows: torch.exp(slope * torch.tanh(rows)))
        call = replace(call, weights=weights, leaves={**call.leaves, "slope": slope})
        return {name: tensor.cpu() for name, tensor in call.results(each).items()}

    assert_close(results(DEVICE, TRITON, exact=False), results("cpu", LOOP, exact=True), TOLERANCE[torch.float32])


def test_frozen_parts_get_no_gradient_and_do_not_stop_others() -> None:
    def results(each: Any) -> dict[str, Tensor]:
        call = make_call("gelu_gated_biased", device=DEVICE)
        for name in ("up", "down_bias"):
            call.leaves.pop(name).requires_grad_(False)
        return call.results(each)

    assert_close(results(TRITON), results(LOOP), TOLERANCE[torch.float32])


def test_backward_keeps_the_first_projection_and_no_other_rows() -> None:
    call = make_call("silu_gated", device=DEVICE)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        call.output(TRITON)
    known = {leaf.data_ptr() for leaf in (*call.leaves.values(), call.index_TK)}
    shapes = sorted(tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in known)
    assert shapes == [(4,), (14,), (14, 10)]  # ends of experts, order of picks, first projection


def test_gradients_of_transposed_weights_are_not_transposed_copies() -> None:
    found = make_call("relu_gated_transposed", device=DEVICE).results(TRITON)
    assert found["up"].is_contiguous()
    assert found["down"].is_contiguous()


@pytest.mark.parametrize("layout", ["silu_gated", "clamped_interleaved_transposed_biased", "unknown_gate"])
def test_autocast_computes_in_bfloat16(layout: str) -> None:
    exact = make_call(layout, exact=True).results(LOOP)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = make_call(layout, device=DEVICE).results(TRITON)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    found = {name: tensor.cpu() for name, tensor in found.items()}
    assert_close(found, exact, TOLERANCE[torch.bfloat16], AT_CLAMPS[torch.bfloat16])
    with pytest.raises(AssertionError):
        assert_close(found, exact, TOLERANCE[torch.float32])


@pytest.mark.parametrize("activation", ["silu", "clamped_swiglu"])
def test_compiles_to_one_graph_forward_and_backward(activation: str) -> None:
    torch.manual_seed(0)
    values: dict[str, Any] = {"swiglu_alpha": 1.702, "swiglu_limit": 0.5} if activation == "clamped_swiglu" else {}
    values |= {"activation": activation, "num_experts": 4, "intermediate_size": 5, "bias": True, "kernel": "triton"}
    experts = Experts(ExpertsConfig(**values), 6).to(DEVICE)
    call = make_call("silu_gated", "some_sentinels", device=DEVICE)
    inputs = (call.x_TD, call.index_TK, call.weight_TK)
    leaves = [call.x_TD, call.weight_TK, *experts.parameters()]
    expected_TD = experts(*inputs)
    expected = torch.autograd.grad(expected_TD.square().sum(), leaves)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    actual_TD = compiled(*inputs)
    torch.testing.assert_close(actual_TD, expected_TD)
    torch.testing.assert_close(torch.autograd.grad(actual_TD.square().sum(), leaves), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), expected_TD)


def test_checkpointing_repeats_the_same_bits() -> None:
    call = make_call("silu_gated", "some_sentinels", device=DEVICE)
    expected = call.results(TRITON)
    run = lambda x_TD: TRITON.run(call.weights, x_TD, call.index_TK, call.weight_TK)  # noqa: E731
    actual = call.results(TRITON, lambda: checkpoint(run, call.x_TD, use_reentrant=False))  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["silu_gated", "unknown_gate"])
def test_second_derivative_is_refused_instead_of_zero(layout: str) -> None:
    call = make_call(layout, device=DEVICE)
    (gradient,) = torch.autograd.grad(call.output(TRITON).sum(), call.leaves["down"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"moesaic.triton_weight_gradient"):
        gradient.square().sum().backward()


def test_custom_ops_pass_torch_opcheck() -> None:
    call = make_call("clamped_biased", device=DEVICE)  # no rows of no expert: they hold whatever the memory held
    weights, index_TK = call.weights, call.index_TK
    tensors = (weights.up_NHD, weights.down_NDF, weights.up_bias_NH, weights.down_bias_ND)
    pick_S, end_N = schedule.sort_picks(index_TK, weights.num_experts)
    rows_SF = torch.randn(pick_S.numel(), 5, device=DEVICE, requires_grad=True)
    formula = ("clamped_swiglu", True, False, 1.702, 0.5)
    ops = torch.ops.moesaic
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.triton_experts, (call.x_TD, *tensors, index_TK, call.weight_TK, pick_S, end_N, *formula, False)),
        (ops.triton_gather_linear, (call.x_TD, tensors[0], tensors[2], index_TK, pick_S, end_N, False)),
        (
            ops.triton_linear_scatter,
            (rows_SF, tensors[1], tensors[3], call.weight_TK, index_TK, pick_S, end_N, False),
        ),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)
    with torch.no_grad():
        arguments = (call.x_TD.detach(), *(tensor.detach() for tensor in tensors if tensor is not None))
        arguments = (*arguments, index_TK, call.weight_TK.detach(), *formula, False)
        torch.library.opcheck(ops.triton_experts_inference.default, arguments)


@pytest.mark.parametrize("block_rows", [1, 2, 16])
@pytest.mark.parametrize("picks", [name for name in PICKS if name != "no_tokens"])
def test_blocks_cover_every_row_of_an_expert_once(picks: str, block_rows: int) -> None:
    index_TK = make_call(picks=picks, size="larger", device=DEVICE).index_TK
    pick_S, end_N = schedule.sort_picks(index_TK, 8)
    blocks = schedule.make_schedule(end_N, pick_S.numel(), block_rows)
    covered = []
    for expert, start in zip(blocks.expert_B.tolist(), blocks.start_B.tolist(), strict=True):
        if expert >= 0:
            end = min(start + block_rows, int(end_N[expert]))
            assert end > start
            covered += [(row, expert) for row in range(start, end)]
    experts = index_TK.flatten()[pick_S].tolist()
    assert covered == [(row, expert) for row, expert in enumerate(experts) if expert < 8]


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", tiles.SHARED_MEMORY)
def test_every_tile_fits_the_shared_memory(
    capability: tuple[int, int], dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "dot_precision", lambda dtype: precision)
    limit = tiles.SHARED_MEMORY[capability]
    for product in tiles.PRODUCTS:
        for row_class in tiles.ROW_CLASSES:
            tile = tiles.lookup(product, row_class, dtype, limit)
            assert tile.shared_bytes(product, dtype.itemsize) <= limit
            assert tile.num_stages >= (3 if product == "weight_gradient" else 2)  # loads overlap products
            if product != "weight_gradient":
                assert tile.rows == tiles.block_rows(row_class, dtype)


def on_gpu(**changes: Any) -> Case:
    return make_call().case()._replace(**{"device": "cuda", "capability": (9, 0), **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": torch.bfloat16, "weight_dtype": torch.bfloat16}, None),
        ({"autocast": torch.bfloat16}, None),
        ({"fused": None}, None),
        ({"capability": (7, 5)}, r"compute capability 8.0 .* got 7.5"),
        ({"dtype": torch.float64}, r"bfloat16, float16 or float32, got torch.float64"),
        ({"dtype": torch.float64, "autocast": torch.bfloat16}, r"got torch.float64"),
        ({"weight_dtype": torch.float8_e4m3fn}, r"at least 16 bits, got torch.float8"),
        ({"device": "mps"}, r"needs a CUDA device, got mps"),
    ],
)
def test_refusals_say_why(changes: dict[str, Any], reason: str | None) -> None:
    refusal = kernel.refuses(on_gpu(**changes))
    if reason is None:
        assert refusal is None
    else:
        assert re.search(reason, refusal or "")


def test_runs_on_a_cpu_in_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in str(kernel.refuses(make_call().case()))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernel.refuses(make_call().case()) is None


def test_auto_takes_it_on_a_gpu_and_never_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select("auto", on_gpu(), KERNELS).name == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select("auto", make_call().case(), KERNELS).name != "triton"


def test_a_layer_by_name() -> None:
    call = make_call("silu_gated", device=DEVICE)
    y_TD = run_experts("triton", call.weights, call.x_TD, call.index_TK, call.weight_TK)
    assert torch.equal(y_TD, call.output(TRITON))


@pytest.mark.parametrize("installed", [True, False], ids=["with_triton", "without_triton"])
def test_import_and_a_layer_on_cpu_do_not_load_the_kernels(installed: bool) -> None:
    """Triton takes long to load, and is not there on every system."""
    block = "" if installed else "sys.modules['triton'] = None"
    script = f"""
import sys
{block}
import torch
from moesaic.layer import Experts, ExpertsConfig
experts = Experts(ExpertsConfig(num_experts=2, intermediate_size=4), 4)
experts(torch.ones(3, 4), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)).sum().backward()
assert "moesaic.layer.kernels.triton.ops" not in sys.modules
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
