"""The Triton kernel against `loop`, forward and backward: on a GPU if there is one, else in Triton's interpreter.

The interpreter checks numbers, not compilation (tests/layer/test_triton_compile.py) and not speed.
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
from tests.layer.triton_cases import (
    DEVICE,
    FORMULAS,
    N,
    assert_same,
    make_weights,
    output_and_gradients,
    random_picks,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.errors import UnsupportedKernel
from moesaic.layer import Experts, ExpertsConfig
from moesaic.layer.kernels import KERNELS, Case, ExpertWeights, run_experts, select
from moesaic.layer.kernels import triton as kernel

decode, schedule, tiles = (
    pytest.importorskip(f"moesaic.layer.kernels.triton.{name}", reason="needs Triton, which is not installed")
    for name in ("decode", "schedule", "tiles")
)

PICKS = {
    "random": torch.tensor([[0, 3], [2, 1], [3, 2], [1, 0], [0, 2]]),
    "skewed": torch.full((6, 2), 1),
    "empty_experts": torch.tensor([[3, 0], [0, 3], [3, 0]]),
    "some_sentinels": torch.tensor([[4, 0], [2, 4], [4, 4], [1, 3]]),
    "no_rows": torch.full((3, 2), N),
    "tied": torch.tensor([[2, 2], [0, 0], [2, 2]]),
    "single_token": torch.tensor([[3, 1]]),
    "no_tokens": torch.empty(0, 2, dtype=torch.int64),
}


@pytest.fixture(autouse=True)
def _interpreter_multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps bfloat16 as integers and multiplies those; give it their values."""
    if DEVICE.type == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32) for handle in (a, b))
        return original(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that every loop and every mask is used at small sizes."""
    monkeypatch.setattr(tiles, "block_rows", lambda rows_per_expert: 16)
    monkeypatch.setattr(tiles, "choose", lambda *_: tiles.Tile(16, 32, 16, 4, 2))


@pytest.mark.parametrize("picks", PICKS)
@pytest.mark.parametrize("formula", FORMULAS)
def test_equals_loop_forward_and_backward(formula: str, picks: str) -> None:
    weights, leaves = make_weights(FORMULAS[formula], bias=formula != "silu")
    expected = output_and_gradients("loop", weights, leaves, PICKS[picks])
    assert_same(output_and_gradients("triton", weights, leaves, PICKS[picks]), expected, 1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("formula", ["silu", "gelu", "clamped_interleaved"])
@pytest.mark.parametrize(("hidden", "width"), [(72, 40), (64, 32)], ids=["odd", "even"])
def test_equals_loop_with_many_tiles(formula: str, transposed: bool, hidden: int, width: int) -> None:
    weights, leaves = make_weights(FORMULAS[formula], hidden=hidden, width=width, transposed=transposed)
    index_TK = random_picks(45)
    expected = output_and_gradients("loop", weights, leaves, index_TK)
    assert_same(output_and_gradients("triton", weights, leaves, index_TK), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("formula", ["silu", "relu2", "clamped_interleaved"])
def test_half_precision_is_as_near_to_exact_as_loop(formula: str, dtype: torch.dtype) -> None:
    """Both against float64 of the same rounded numbers: the kernel, which rounds less often, may not be further away."""
    weights, leaves = make_weights(FORMULAS[formula], dtype, hidden=40, width=24)
    exact_leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    exact_weights = ExpertWeights(
        exact_leaves["up"],
        exact_leaves["down"],
        weights.activate,
        exact_leaves["up_bias"],
        exact_leaves["down_bias"],
        weights.fused,
    )
    index_TK = random_picks(30)
    actual = output_and_gradients("triton", weights, leaves, index_TK)
    loop = output_and_gradients("loop", weights, leaves, index_TK)
    # `x` and the upstream gradient are rounded where the weights are, so draw them from the rounded call.
    exact = _exact(weights, exact_weights, exact_leaves, index_TK)
    for key, value in exact.items():
        error, loop_error = ((result[key].double() - value).norm() for result in (actual, loop))
        floor = 2 * torch.finfo(dtype).eps * value.norm()  # a kernel can't beat the rounding of its result
        assert error <= max(1.5 * loop_error, floor), (key, error, loop_error)


def _exact(
    weights: ExpertWeights, exact_weights: ExpertWeights, leaves: dict[str, Tensor], index_TK: Tensor
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, hidden, dtype = index_TK.shape[0], weights.down_NDF.shape[1], weights.up_NHD.dtype
    x_TD, upstream_TD = (
        torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(DEVICE, dtype).double()
        for _ in range(2)
    )
    weight_TK = torch.rand(index_TK.shape, generator=generator).double().to(DEVICE).requires_grad_()
    inputs = {"x": x_TD.requires_grad_(), "weight": weight_TK, **leaves}
    y_TD = run_experts("loop", exact_weights, x_TD, index_TK.to(DEVICE), weight_TK)
    gradients = torch.autograd.grad(y_TD, list(inputs.values()), upstream_TD)
    return {"y": y_TD.detach(), **dict(zip(inputs, gradients, strict=True))}


@pytest.mark.parametrize("tokens", [1, 3, 40], ids=["one", "few", "sorted"])
@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("formula", ["silu", "gelu", "clamped_interleaved"])
def test_inference_equals_loop(formula: str, transposed: bool, tokens: int) -> None:
    """Without gradients few rows take another path, and many save nothing."""
    weights, _ = make_weights(FORMULAS[formula], hidden=72, width=70, transposed=transposed)
    index_TK = random_picks(tokens).to(DEVICE)
    assert (index_TK.numel() <= decode.MAX_PICKS) == (tokens < 40)
    x_TD = torch.randn(tokens, 72, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    weight_TK = torch.rand(tokens, 2, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    with torch.no_grad():
        actual_TD = run_experts("triton", weights, x_TD, index_TK, weight_TK)
        expected_TD = run_experts("loop", weights, x_TD, index_TK, weight_TK)
    torch.testing.assert_close(actual_TD, expected_TD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_tokens_without_experts_may_hold_nan(grad: bool) -> None:
    weights, leaves = make_weights(FORMULAS["silu"])
    index_TK = torch.tensor([[0, 4], [4, 4], [2, 1]], device=DEVICE)
    x_TD = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x_TD[1] = torch.nan
    weight_TK = torch.rand(3, 2).to(DEVICE)
    weight_TK[1] = torch.nan
    x_TD.requires_grad_(grad)
    weight_TK.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y_TD = run_experts("triton", weights, x_TD, index_TK, weight_TK)
    assert y_TD.isfinite().all()
    assert y_TD[1].eq(0).all()
    if grad:
        gradients = torch.autograd.grad(y_TD.square().sum(), [x_TD, weight_TK, *leaves.values()])
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert gradients[0][1].eq(0).all()
        assert gradients[1][1].eq(0).all()


@pytest.mark.parametrize("formula", ["silu", "clamped"])
def test_atomic_scatter_equals_the_ordered_one(formula: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, leaves = make_weights(FORMULAS[formula])
    expected = output_and_gradients("triton", weights, leaves, PICKS["some_sentinels"])
    monkeypatch.setenv(kernel.SCATTER_VARIABLE, "atomic")
    assert_same(output_and_gradients("triton", weights, leaves, PICKS["some_sentinels"]), expected, 1e-5)


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
def test_unknown_activations_run_between_the_products(picks: str) -> None:
    """Also with a parameter of their own, whose gradient must not see rows of no expert."""
    weights, leaves = make_weights(FORMULAS["gelu"])
    slope = torch.tensor(0.7, device=DEVICE, requires_grad=True)
    unknown = replace(weights, activate=lambda rows: torch.exp(slope * torch.tanh(rows)), fused=None)
    leaves = {**leaves, "slope": slope}
    expected = output_and_gradients("loop", unknown, leaves, PICKS[picks])
    assert_same(output_and_gradients("triton", unknown, leaves, PICKS[picks]), expected, 1e-5)


def test_frozen_parts_get_no_gradient_and_do_not_stop_others() -> None:
    weights, leaves = make_weights(FORMULAS["silu"])
    for name in ("up", "down_bias"):
        leaves.pop(name).requires_grad_(False)
    expected = output_and_gradients("loop", weights, leaves, PICKS["random"])
    assert_same(output_and_gradients("triton", weights, leaves, PICKS["random"]), expected, 1e-5)


def test_backward_keeps_the_first_projection_and_no_other_rows() -> None:
    weights, leaves = make_weights(FORMULAS["silu"], hidden=20, width=12)
    x_TD = torch.randn(7, 20, device=DEVICE, requires_grad=True)
    index_TK, weight_TK = random_picks(7).to(DEVICE), torch.ones(7, 2, device=DEVICE)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        run_experts("triton", weights, x_TD, index_TK, weight_TK)
    parameters = {leaf.data_ptr() for leaf in (*leaves.values(), x_TD, index_TK, weight_TK)}
    shapes = sorted(tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in parameters)
    assert shapes == [(4,), (14,), (14, 24)]  # ends of experts, order of picks, first projection


def test_gradients_of_transposed_weights_are_not_transposed_copies() -> None:
    weights, leaves = make_weights(FORMULAS["silu"], transposed=True)
    gradients = output_and_gradients("triton", weights, leaves, PICKS["random"])
    assert gradients["up"].is_contiguous()
    assert gradients["down"].is_contiguous()


@pytest.mark.parametrize("formula", ["silu", "clamped_interleaved", None])
def test_autocast_equals_loop_within_rounding(formula: str | None) -> None:
    weights, leaves = make_weights(FORMULAS[formula or "silu"])
    weights = weights if formula else replace(weights, fused=None)
    exact = output_and_gradients("loop", weights, leaves, PICKS["random"])
    with torch.autocast(DEVICE.type, torch.bfloat16):
        actual = output_and_gradients("triton", weights, leaves, PICKS["random"])
    assert not torch.equal(actual["y"], exact["y"])  # it did run in bfloat16
    assert_same(actual, exact, 0.03)


@pytest.mark.parametrize("formula", ["silu", "gelu"])
def test_compiles_to_one_graph_forward_and_backward(formula: str) -> None:
    torch.manual_seed(0)
    config = ExpertsConfig(
        num_experts=N,
        intermediate_size=5,
        bias=True,
        kernel="triton",
        activation=FORMULAS[formula].name,  # type: ignore[arg-type]
        gated=FORMULAS[formula].gated,
    )
    experts = Experts(config, 6).to(DEVICE)
    x_TD = torch.randn(5, 6, device=DEVICE, requires_grad=True)
    index_TK, weight_TK = PICKS["random"].to(DEVICE), torch.rand(5, 2, device=DEVICE, requires_grad=True)
    leaves = [x_TD, weight_TK, *experts.parameters()]
    expected_TD = experts(x_TD, index_TK, weight_TK)
    expected = torch.autograd.grad(expected_TD.square().sum(), leaves)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    actual_TD = compiled(x_TD, index_TK, weight_TK)
    torch.testing.assert_close(actual_TD, expected_TD)
    torch.testing.assert_close(torch.autograd.grad(actual_TD.square().sum(), leaves), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x_TD, index_TK, weight_TK), expected_TD)


def test_checkpointing_repeats_the_same_bits() -> None:
    weights, leaves = make_weights(FORMULAS["silu"])
    x_TD = torch.randn(5, 6, device=DEVICE, requires_grad=True)
    index_TK, weight_TK = PICKS["random"].to(DEVICE), torch.rand(5, 2, device=DEVICE)

    def layer(x_TD: Tensor) -> Tensor:
        return run_experts("triton", weights, x_TD, index_TK, weight_TK)

    inputs = [x_TD, *leaves.values()]
    expected = torch.autograd.grad(layer(x_TD).square().sum(), inputs)
    y_TD = checkpoint(layer, x_TD, use_reentrant=False)
    assert isinstance(y_TD, Tensor)
    actual = torch.autograd.grad(y_TD.square().sum(), inputs)
    assert all(map(torch.equal, actual, expected))


def test_second_derivative_is_refused_instead_of_zero() -> None:
    weights, leaves = make_weights(FORMULAS["silu"])
    x_TD = torch.randn(5, 6, device=DEVICE, requires_grad=True)
    y_TD = run_experts("triton", weights, x_TD, PICKS["random"].to(DEVICE), torch.ones(5, 2, device=DEVICE))
    (gradient,) = torch.autograd.grad(y_TD.sum(), leaves["down"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"moesaic.triton_weight_gradient"):
        gradient.square().sum().backward()


def test_custom_ops_pass_torch_opcheck() -> None:
    weights, _ = make_weights(FORMULAS["silu"])
    tensors = (weights.up_NHD, weights.down_NDF, weights.up_bias_NH, weights.down_bias_ND)
    index_TK = PICKS["random"].to(DEVICE)  # without rows of no expert, which hold whatever the memory held
    pick_S, end_N = schedule.sort_picks(index_TK, N)
    x_TD = torch.randn(5, 6, device=DEVICE, requires_grad=True)
    weight_TK = torch.rand(5, 2, device=DEVICE, requires_grad=True)
    formula = ("silu", True, False, 0.0, 0.0)
    ops = torch.ops.moesaic
    rows_SF = torch.randn(10, 5, device=DEVICE, requires_grad=True)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.triton_experts, (x_TD, *tensors, index_TK, weight_TK, pick_S, end_N, *formula, False)),
        (
            ops.triton_experts_inference,
            (x_TD.detach(), *_detached(tensors), index_TK, weight_TK.detach(), *formula, False),
        ),
        (ops.triton_gather_linear, (x_TD, tensors[0], tensors[2], index_TK, pick_S, end_N, False)),
        (ops.triton_linear_scatter, (rows_SF, tensors[1], tensors[3], weight_TK, index_TK, pick_S, end_N, False)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)


def _detached(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach() for tensor in tensors]


@pytest.mark.parametrize("block_rows", [1, 2, 16])
@pytest.mark.parametrize("picks", [name for name, index_TK in PICKS.items() if index_TK.numel()])
def test_blocks_cover_every_row_of_an_expert_once(picks: str, block_rows: int) -> None:
    index_TK = PICKS[picks].to(DEVICE)
    pick_S, end_N = schedule.sort_picks(index_TK, N)
    blocks = schedule.make_schedule(end_N, pick_S.numel(), block_rows)
    covered = []
    for expert, start in zip(blocks.expert_B.tolist(), blocks.start_B.tolist(), strict=True):
        if expert >= 0:
            end = min(start + block_rows, int(end_N[expert]))
            assert end > start
            covered += [(row, expert) for row in range(start, end)]
    experts = index_TK.flatten()[pick_S].tolist()
    assert covered == [(row, expert) for row, expert in enumerate(experts) if expert < N]


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("capability", tiles.SHARED_MEMORY)
def test_every_tile_fits_the_shared_memory(capability: tuple[int, int], element_size: int) -> None:
    limit = tiles.SHARED_MEMORY[capability]
    for product, tile in tiles.table(capability):
        fitted = tiles.fitted(tile, product, element_size, limit)
        assert fitted.num_stages >= 2, (product, tile)
        assert fitted.num_stages * fitted.stage_bytes(product, element_size) <= limit


def _case(**changes: Any) -> Case:
    weights, _ = make_weights(FORMULAS["silu"])
    case = Case.of(weights, torch.ones(1, 6), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
    return case._replace(**{"device": "cuda", "capability": (9, 0), **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": torch.bfloat16, "weight_dtype": torch.bfloat16}, None),
        ({"autocast": torch.bfloat16}, None),
        ({"fused": None}, None),
        ({"capability": (7, 5)}, "compute capability 8.0 .* got 7.5"),
        ({"dtype": torch.float64}, "bfloat16, float16 or float32, got torch.float64"),
        ({"dtype": torch.float64, "autocast": torch.bfloat16}, "got torch.float64"),
        ({"weight_dtype": torch.float8_e4m3fn}, "at least 16 bits, got torch.float8"),
        ({"device": "mps"}, "needs a CUDA device, got mps"),
    ],
)
def test_refusals_say_why(changes: dict[str, Any], reason: str | None) -> None:
    refusal = kernel.refuses(_case(**changes))
    if reason is None:
        assert refusal is None
    else:
        assert re.search(reason, refusal or "")


def test_runs_on_a_cpu_in_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in str(kernel.refuses(_case(device="cpu", capability=(0, 0))))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernel.refuses(_case(device="cpu", capability=(0, 0))) is None


def test_auto_takes_it_on_a_gpu_and_never_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select("auto", _case(), KERNELS).name == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select("auto", _case(device="cpu", capability=(0, 0)), KERNELS).name != "triton"


@pytest.mark.parametrize("installed", [True, False], ids=["with_triton", "without_triton"])
def test_import_and_a_layer_on_cpu_do_not_load_the_kernels(installed: bool) -> None:
    """Triton takes long to load, and is not there on every system."""
    block = "" if installed else "import importlib.util, sys; sys.modules['triton'] = None"
    script = f"""
{block}
import sys, torch
from moesaic.layer import Experts, ExpertsConfig
from moesaic.layer.kernels import run_experts
experts = Experts(ExpertsConfig(num_experts=2, intermediate_size=4), 4)
experts(torch.ones(3, 4), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)).sum().backward()
assert "moesaic.layer.kernels.triton.ops" not in sys.modules
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
