"""Every kernel under compilation, checkpointing, autocast, threads, and torch's checks of custom ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.layer.kernels.cases import AT_CLAMPS, KERNELS, LOOP, TOLERANCE, Call, assert_close, make_call, runs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moesaic.layer import Experts, ExpertsConfig, MoEBlock, MoESpec, RoutingContext
from moesaic.layer.kernels import KERNELS as OURS
from moesaic.layer.kernels import Kernel, run_experts

LAYOUTS = ["silu_gated", "clamped_interleaved_transposed_biased", "unknown_plain_biased"]
SIZE = "larger"


def through_the_registry(call: Call, kernel: Kernel) -> Callable[[Tensor], Tensor]:
    """What models run: select, then compute."""

    def run(x_TD: Tensor) -> Tensor:
        return run_experts(kernel.name, call.weights, x_TD, call.index_TK, call.weight_TK, kernels=KERNELS)

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "device", "dtype"), runs(torch.float32, torch.bfloat16))
def test_compiles_to_one_graph_forward_and_backward(
    kernel: Kernel, device: str, dtype: torch.dtype, layout: str
) -> None:
    if kernel is LOOP:
        pytest.skip("loop looks up each expert's rows, whose number depends on data")
    torch.compiler.reset()
    call = make_call(layout, "some_sentinels", SIZE, dtype, device)
    call.skip_unless(kernel, call.case()._replace(compiling=True))
    # The aot_eager back end traces forward and backward as inductor does and spares the C++ compiler.
    compiled = torch.compile(through_the_registry(call, kernel), fullgraph=True, backend="aot_eager")
    actual, expected = call.results(kernel, lambda: compiled(call.x_TD)), call.results(kernel)
    assert_close(actual, expected, TOLERANCE[dtype], AT_CLAMPS.get(dtype) if "clamped" in layout else None)


@pytest.mark.parametrize(("kernel", "device", "dtype"), runs(torch.float32, torch.bfloat16))
def test_compiles_without_a_graph_of_gradients_for_any_number_of_tokens(
    kernel: Kernel, device: str, dtype: torch.dtype
) -> None:
    if kernel is LOOP:
        pytest.skip("loop looks up each expert's rows, whose number depends on data")
    torch.compiler.reset()
    call = make_call("silu_gated", "random", SIZE, dtype, device)

    def run(x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return run_experts(kernel.name, call.weights, x_TD, index_TK, weight_TK, kernels=KERNELS)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        call.skip_unless(kernel, call.case()._replace(compiling=True))
        for tokens in (1, 2, 5, 61):
            tensors = (call.x_TD[:tokens], call.index_TK[:tokens], call.weight_TK[:tokens])
            assert_close({"y": compiled(*tensors)}, {"y": run(*tensors)}, TOLERANCE[dtype])


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "device", "dtype"), runs(torch.float32, torch.bfloat16))
def test_checkpointing_changes_nothing(
    kernel: Kernel, device: str, dtype: torch.dtype, layout: str, use_reentrant: bool
) -> None:
    call = make_call(layout, "some_sentinels", SIZE, dtype, device)
    call.skip_unless(kernel)

    def gradients(run: Callable[[Tensor], Any]) -> dict[str, Tensor]:
        for leaf in call.leaves.values():
            leaf.grad = None
        y_TD = run(call.x_TD)
        y_TD.backward(call.upstream_TD)
        return {"y": y_TD.detach(), **{name: leaf.grad for name, leaf in call.leaves.items() if leaf.grad is not None}}

    run = through_the_registry(call, kernel)
    expected = gradients(run)
    actual = gradients(lambda x_TD: checkpoint(run, x_TD, use_reentrant=use_reentrant))
    assert expected.keys() == {"y", *call.leaves}
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["silu_gated", "gelu_gated_biased"])
@pytest.mark.parametrize(("kernel", "device", "dtype"), runs(torch.float32))
def test_autocast_computes_in_bfloat16(kernel: Kernel, device: str, dtype: torch.dtype, layout: str) -> None:
    call = make_call(layout, size=SIZE, dtype=dtype, device=device)
    with torch.autocast(device, torch.bfloat16):
        call.skip_unless(kernel)
        actual = call.results(kernel)
    exact = make_call(layout, size=SIZE, dtype=dtype, exact=True).results(LOOP)
    assert actual["y"].dtype == torch.float32
    assert all(actual[name].dtype == torch.float32 for name in call.leaves)
    actual = {name: tensor.cpu() for name, tensor in actual.items()}
    assert_close(actual, exact, TOLERANCE[torch.bfloat16])
    with pytest.raises(AssertionError):
        assert_close(actual, exact, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("kernel", "device", "dtype"), runs(torch.float64))
def test_autocast_leaves_float64_alone(kernel: Kernel, device: str, dtype: torch.dtype) -> None:
    """As torch's own linear does: autocast never rounds double precision."""
    call = make_call("gelu_gated_biased", dtype=dtype, device=device)
    expected = call.results(kernel)
    with torch.autocast(device, torch.bfloat16):
        call.skip_unless(kernel)
        actual = call.results(kernel)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("kernel", "device", "dtype"), runs(torch.float32))
def test_a_second_derivative_is_right_or_refused(kernel: Kernel, device: str, dtype: torch.dtype) -> None:
    """A kernel whose backward has no backward must say so instead of giving zero."""

    def second(each: Kernel) -> Tensor:
        call = make_call("silu_gated", size=SIZE, dtype=dtype, device=device)
        call.skip_unless(kernel)
        (gradient,) = torch.autograd.grad(call.output(each).sum(), call.leaves["down"], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), call.leaves["up"])[0]

    expected = second(LOOP)
    try:
        actual = second(kernel)
    except (RuntimeError, NotImplementedError):
        return
    assert_close({"up": actual}, {"up": expected}, TOLERANCE[dtype])


@pytest.mark.parametrize(("kernel", "device", "dtype"), runs(torch.float32))
def test_threads_do_not_change_the_result(kernel: Kernel, device: str, dtype: torch.dtype) -> None:
    """Sums in an order that depends on timing would end exact resume."""
    if kernel not in OURS:
        pytest.skip("the gradient of its gather is torch's, which adds in any order")
    call = make_call("silu_gated", "random", SIZE, dtype, device)
    call.skip_unless(kernel)
    torch.manual_seed(0)
    experts = Experts(ExpertsConfig(num_experts=16, intermediate_size=24), 64).to(device)
    x_TD = torch.randn(2048, 64, device=device, requires_grad=True)
    index_TK = torch.stack([torch.randperm(16)[:6] for _ in range(2048)]).to(device)
    weight_TK = torch.rand(2048, 6, device=device, requires_grad=True)
    inputs = (x_TD, weight_TK, *experts.parameters())
    call = Call({}, type(call.weights).of(experts), x_TD, index_TK, weight_TK, torch.empty(0))

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call.output(kernel).square().sum(), inputs)

    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first = gradients()
        for _ in range(5):
            assert all(map(torch.equal, first, gradients()))
    finally:
        torch.set_num_threads(threads)


class _OurOps(TorchDispatchMode):
    """Collects the calls of this package's custom ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "moesaic":
            self.calls.setdefault(function, args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel", "device", "dtype"), runs(torch.float32))
def test_custom_ops_pass_torch_opcheck(kernel: Kernel, device: str, dtype: torch.dtype, layout: str) -> None:
    call = make_call(layout, "some_sentinels", dtype=dtype, device=device)
    call.skip_unless(kernel)
    with _OurOps() as forward:
        y_TD = call.output(kernel)
    with _OurOps() as backward:
        torch.autograd.grad(y_TD, list(call.leaves.values()), call.upstream_TD)
    for function, arguments in forward.calls.items():
        torch.library.opcheck(function, [copy_of(value, needs_grad=True) for value in arguments])
    for function, arguments in backward.calls.items():
        torch.library.opcheck(function, [copy_of(value, needs_grad=False) for value in arguments])


def copy_of(value: Any, *, needs_grad: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return copy.copy_(value.detach()).requires_grad_(needs_grad and value.is_floating_point())


def test_block_compiles_to_one_graph_forward_and_backward() -> None:
    torch.manual_seed(0)
    spec = MoESpec.from_dict(
        {
            "experts": {"num_experts": 4, "intermediate_size": 5, "bias": True},
            "router": {"type": "top_k", "top_k": 2, "selection_bias": True, "num_groups": 2, "top_k_groups": 1},
            "shared_experts": {"sigmoid_gate": True},
        }
    )
    block = MoEBlock(spec, 6)
    x_BTD = torch.randn(2, 3, 6)
    leaves = [x_BTD.requires_grad_(), *block.parameters()]
    expected_BTD = block(x_BTD)
    expected = torch.autograd.grad(expected_BTD.square().sum(), leaves)
    actual_BTD = torch.compile(block, fullgraph=True, backend="aot_eager")(x_BTD)
    actual = torch.autograd.grad(actual_BTD.square().sum(), leaves)
    torch.testing.assert_close(actual_BTD, expected_BTD)
    torch.testing.assert_close(actual, expected)


def test_compiled_block_records_its_routing() -> None:
    spec = MoESpec.from_dict(
        {"experts": {"num_experts": 4, "intermediate_size": 5}, "router": {"type": "top_k", "top_k": 2}}
    )
    block = MoEBlock(spec, 6, layer=3)
    compiled, eager = RoutingContext(), RoutingContext()
    x_TD = torch.randn(5, 6)
    torch.compile(block, fullgraph=True, backend="aot_eager")(x_TD, compiled)
    block(x_TD, eager)
    torch.testing.assert_close(compiled.records[3].weight_TK, eager.records[3].weight_TK)
    assert torch.equal(compiled.records[3].index_TK, eager.records[3].index_TK)
