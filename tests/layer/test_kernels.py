"""Every kernel against `loop`, forward and backward, on the inputs that break kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moesaic.errors import UnsupportedKernel
from moesaic.layer import Experts, ExpertsConfig, MoEBlock, MoESpec, RoutingContext
from moesaic.layer import kernels as kernel_registry
from moesaic.layer.activations import clamped_swiglu, gated
from moesaic.layer.kernels import KERNELS, Case, ExpertWeights, run_experts, select, selection

N, K, D, WIDTH = 4, 2, 6, 5
# "native" takes no float64 and has no backward yet; tests/layer/test_native.py compares it.
ALL = [kernel.name for kernel in KERNELS if kernel.name != "native"]
FAST = [name for name in ALL if name != "loop"]

# What happens between the projections: H as a multiple of F, biases, activation.
SHAPES: dict[str, tuple[int, bool, Callable[[Tensor], Tensor]]] = {
    "gated": (2, False, partial(gated, activation=F.silu)),
    "plain": (1, False, F.gelu),
    "biased": (2, True, partial(gated, activation=F.silu)),
    "plain_biased": (1, True, F.gelu),
    "clamped_swiglu": (2, True, partial(clamped_swiglu, alpha=1.702, limit=0.5)),
}

INDEX_TK: dict[str, Tensor] = {
    "random": torch.tensor([[0, 3], [2, 1], [3, 2], [1, 0], [0, 2]]),
    "skewed": torch.full((6, 2), 1),
    "empty_experts": torch.tensor([[3, 0], [0, 3], [3, 0]]),
    "some_sentinels": torch.tensor([[4, 0], [2, 4], [4, 4], [1, 3]]),
    "no_rows": torch.full((3, 2), N),
    "tied": torch.tensor([[2, 2], [0, 0], [2, 2]]),
    "single_token": torch.tensor([[3, 1]]),
    "no_tokens": torch.empty(0, 2, dtype=torch.int64),
}


def make_weights(shape: str, dtype: torch.dtype) -> ExpertWeights:
    multiple, bias, activate = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return ExpertWeights(
        up_NHD=normal(N, multiple * WIDTH, D),
        down_NDF=normal(N, D, WIDTH),
        activate=activate,
        up_bias_NH=normal(N, multiple * WIDTH) if bias else None,
        down_bias_ND=normal(N, D) if bias else None,
    )


def output_and_gradients(
    name: str, weights: ExpertWeights, index_TK: Tensor, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """The output, and the gradient of everything that can have one."""
    generator = torch.Generator().manual_seed(1)
    tokens = index_TK.shape[0]
    x_TD = torch.randn(tokens, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_TK = torch.rand(tokens, K, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    upstream_TD = torch.randn(tokens, D, generator=generator, dtype=torch.float64).to(dtype)
    leaves = {
        "x": x_TD,
        "weight": weight_TK,
        "up": weights.up_NHD,
        "down": weights.down_NDF,
        "up_bias": weights.up_bias_NH,
        "down_bias": weights.down_bias_ND,
    }
    leaves = {key: leaf for key, leaf in leaves.items() if leaf is not None}
    y_TD = run_experts(name, weights, x_TD, index_TK, weight_TK)
    gradients = torch.autograd.grad(y_TD, list(leaves.values()), upstream_TD, materialize_grads=True)
    return {"y": y_TD.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("picks", INDEX_TK)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FAST)
def test_kernel_equals_loop_forward_and_backward(name: str, shape: str, picks: str, dtype: torch.dtype) -> None:
    weights = make_weights(shape, dtype)
    expected = output_and_gradients("loop", weights, INDEX_TK[picks], dtype)
    actual = output_and_gradients(name, weights, INDEX_TK[picks], dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5  # sums of at most 12 products of order 1 to 10
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_loop_equals_one_expert_at_a_time(shape: str) -> None:
    """The specification itself, against the formula written for one token and one pick."""
    weights = make_weights(shape, torch.float64)
    generator = torch.Generator().manual_seed(2)
    index_TK = INDEX_TK["some_sentinels"]
    x_TD = torch.randn(4, D, generator=generator, dtype=torch.float64)
    weight_TK = torch.rand(4, K, generator=generator, dtype=torch.float64)
    expected_TD = torch.zeros_like(x_TD)
    for token, row in enumerate(index_TK.tolist()):
        for pick, expert in enumerate(row):
            if expert == N:
                continue
            up_H = weights.up_NHD[expert] @ x_TD[token]
            up_H = up_H if weights.up_bias_NH is None else up_H + weights.up_bias_NH[expert]
            down_D = weights.down_NDF[expert] @ weights.activate(up_H)
            down_D = down_D if weights.down_bias_ND is None else down_D + weights.down_bias_ND[expert]
            expected_TD[token] += weight_TK[token, pick] * down_D
    torch.testing.assert_close(run_experts("loop", weights, x_TD, index_TK, weight_TK), expected_TD)


def test_loop_passes_gradcheck_twice() -> None:
    weights = make_weights("biased", torch.float64)

    def function(*tensors: Tensor) -> Tensor:
        x_TD, weight_TK, up, down, up_bias, down_bias = tensors
        packed = ExpertWeights(up, down, weights.activate, up_bias, down_bias)
        return run_experts("loop", packed, x_TD, INDEX_TK["single_token"], weight_TK)

    leaves = (
        torch.randn(1, D, dtype=torch.float64, requires_grad=True),
        torch.rand(1, K, dtype=torch.float64, requires_grad=True),
        weights.up_NHD,
        weights.down_NDF,
        weights.up_bias_NH,
        weights.down_bias_ND,
    )
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", FAST)
def test_fast_kernels_refuse_a_second_derivative_instead_of_giving_zero(name: str) -> None:
    weights = make_weights("gated", torch.float64)
    x_TD = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    y_TD = run_experts(name, weights, x_TD, INDEX_TK["random"], torch.ones(5, K, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(y_TD.sum(), weights.down_NDF, create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_outer"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_output_has_the_dtype_of_the_input(name: str, dtype: torch.dtype) -> None:
    weights = make_weights("biased", dtype)
    y_TD = run_experts(name, weights, torch.ones(5, D, dtype=dtype), INDEX_TK["random"], torch.ones(5, K))
    assert y_TD.dtype == dtype


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("shape", ["gated", "biased"])
def test_autocast_equals_loop_within_bfloat16_rounding(name: str, shape: str) -> None:
    weights = make_weights(shape, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = output_and_gradients(name, weights, INDEX_TK["random"], torch.float32)
        expected = output_and_gradients("loop", weights, INDEX_TK["random"], torch.float32)
    exact = output_and_gradients("loop", weights, INDEX_TK["random"], torch.float32)
    assert actual["y"] is not None
    assert actual["y"].dtype == torch.float32
    assert not torch.equal(actual["y"], exact["y"])  # type: ignore[arg-type]  # it did run in bfloat16
    for key, value in expected.items():
        assert value is not None
        assert actual[key] is not None
        # bfloat16 keeps 8 bits; a handful of roundings in sequence stay within 2% of the largest value.
        torch.testing.assert_close(actual[key], value, rtol=0, atol=0.02 * value.abs().max().item())


@pytest.mark.parametrize("name", ALL)
def test_autocast_leaves_float64_alone(name: str) -> None:
    """As torch's own linear does: autocast never rounds double precision."""
    weights = make_weights("biased", torch.float64)
    expected = output_and_gradients(name, weights, INDEX_TK["random"], torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        actual = output_and_gradients(name, weights, INDEX_TK["random"], torch.float64)
    torch.testing.assert_close(actual, expected)


def test_custom_ops_pass_torch_opcheck() -> None:
    generator = torch.Generator().manual_seed(3)
    counts_N = torch.tensor([2, 0, 1, 0])
    rows_SI = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)  # two rows of no expert
    weight_NOI = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    transposed_NOI = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64, requires_grad=True).transpose(1, 2)
    for weight in (weight_NOI, transposed_NOI):
        torch.library.opcheck(torch.ops.moesaic.grouped_linear.default, (rows_SI, weight, counts_N))
    left_SO = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    torch.library.opcheck(torch.ops.moesaic.grouped_outer.default, (left_SO, rows_SI.detach(), counts_N))


def gpt_oss_experts() -> Any:
    config = GptOssConfig(hidden_size=D, intermediate_size=WIDTH, num_local_experts=N, swiglu_limit=0.5)
    config._experts_implementation = "eager"
    return GptOssExperts(config)


def mixtral_experts() -> Any:
    config = MixtralConfig(hidden_size=D, intermediate_size=WIDTH, num_local_experts=N)
    config._experts_implementation = "eager"
    return MixtralExperts(config)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("stock", [gpt_oss_experts, mixtral_experts])
@pytest.mark.parametrize("picks", ["random", "skewed", "empty_experts"])
def test_stock_layouts_give_the_stock_numbers(name: str, stock: Callable[[], Any], picks: str) -> None:
    """gpt-oss stores (in, out), interleaves gate and up and has biases; Mixtral has the default layout."""
    torch.manual_seed(0)
    module = stock().double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    index_TK = INDEX_TK[picks]
    x_TD = torch.randn(index_TK.shape[0], D, dtype=torch.float64, requires_grad=True)
    weight_TK = torch.rand(index_TK.shape, dtype=torch.float64, requires_grad=True)
    leaves = [x_TD, weight_TK, *module.parameters()]
    expected_TD = module(x_TD, index_TK, weight_TK)
    expected = torch.autograd.grad(expected_TD.square().sum(), leaves)
    actual_TD = run_experts(name, ExpertWeights.of(module), x_TD, index_TK, weight_TK)
    actual = torch.autograd.grad(actual_TD.square().sum(), leaves)
    torch.testing.assert_close(actual_TD, expected_TD, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_view_of_stock_weights_copies_nothing() -> None:
    module = gpt_oss_experts()
    weights = ExpertWeights.of(module)
    assert weights.up_NHD.shape == (N, 2 * WIDTH, D)
    assert weights.down_NDF.shape == (N, D, WIDTH)
    assert weights.up_NHD.data_ptr() == module.gate_up_proj.data_ptr()
    assert weights.down_NDF.data_ptr() == module.down_proj.data_ptr()


def test_experts_with_a_norm_behind_them_are_refused() -> None:
    module = mixtral_experts()
    module.has_post_expert_norm = True
    with pytest.raises(UnsupportedKernel, match="norm"):
        ExpertWeights.of(module)


@pytest.mark.parametrize("kernel", ["auto", "grouped"])
def test_block_compiles_to_one_graph_forward_and_backward(kernel: str) -> None:
    torch.manual_seed(0)
    spec = MoESpec.from_dict(
        {
            "experts": {"num_experts": N, "intermediate_size": WIDTH, "bias": True, "kernel": kernel},
            "router": {"type": "top_k", "top_k": K, "selection_bias": True, "num_groups": 2, "top_k_groups": 1},
            "shared_experts": {"sigmoid_gate": True},
        }
    )
    block = MoEBlock(spec, D)
    x_BTD = torch.randn(2, 3, D)
    leaves = [x_BTD.requires_grad_(), *block.parameters()]
    expected_BTD = block(x_BTD)
    expected = torch.autograd.grad(expected_BTD.square().sum(), leaves)
    # The aot_eager back end traces forward and backward as inductor does and spares the C++ compiler.
    actual_BTD = torch.compile(block, fullgraph=True, backend="aot_eager")(x_BTD)
    actual = torch.autograd.grad(actual_BTD.square().sum(), leaves)
    torch.testing.assert_close(actual_BTD, expected_BTD)
    torch.testing.assert_close(actual, expected)


def test_compiled_block_records_its_routing() -> None:
    spec = MoESpec.from_dict(
        {"experts": {"num_experts": N, "intermediate_size": WIDTH}, "router": {"type": "top_k", "top_k": K}}
    )
    block = MoEBlock(spec, D, layer=3)
    compiled, eager = RoutingContext(), RoutingContext()
    x_TD = torch.randn(5, D)
    torch.compile(block, fullgraph=True, backend="aot_eager")(x_TD, compiled)
    block(x_TD, eager)
    torch.testing.assert_close(compiled.records[3].weight_TK, eager.records[3].weight_TK)
    assert torch.equal(compiled.records[3].index_TK, eager.records[3].index_TK)


def case_of(x_TD: Tensor, **options: Any) -> Case:
    tokens = x_TD.shape[0]
    picks = torch.zeros(tokens, K, dtype=torch.int64)
    return Case.of(make_weights("gated", torch.float32), x_TD, picks, torch.ones(tokens, K), **options)


def test_auto_takes_the_first_kernel_that_can() -> None:
    assert select("loop", case_of(torch.ones(1, D)), KERNELS).name == "loop"
    assert select("auto", case_of(torch.ones(1, D, dtype=torch.int64)), KERNELS).name == "loop"


def test_auto_passes_over_a_kernel_that_does_not_suit_the_size() -> None:
    few = kernel_registry.Kernel(
        "few", KERNELS[-1].run, lambda case: None, lambda case: "few rows" if case.rows_per_expert <= 1 else None
    )
    kernels = (few, *KERNELS)
    assert select("auto", case_of(torch.ones(2, D)), kernels).name == "few"
    assert select("auto", case_of(torch.ones(3, D)), kernels).name != "few"
    assert select("few", case_of(torch.ones(3, D)), kernels).name == "few"


def test_unknown_kernel_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(UnsupportedKernel, match=r"'fast'.*no kernel has this name.*auto or one of .*grouped, loop"):
        select("fast", case_of(torch.ones(1, D)), KERNELS)


def test_kernel_that_cannot_run_says_why() -> None:
    with pytest.raises(UnsupportedKernel, match=r"'grouped'.*needs floating point, got torch.int64 input"):
        select("grouped", case_of(torch.ones(1, D, dtype=torch.int64)), KERNELS)


def test_environment_variable_overrides_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(torch.ones(1, D))
    monkeypatch.setenv("MOESAIC_KERNEL", "loop")
    assert select("grouped", case, KERNELS).name == "loop"
    assert select("auto", case, KERNELS).name == "loop"
    monkeypatch.setenv("MOESAIC_KERNEL", "")
    assert select("grouped", case, KERNELS).name == "grouped"
    monkeypatch.setenv("MOESAIC_KERNEL", "fast")
    with pytest.raises(UnsupportedKernel, match=r"MOESAIC_KERNEL = 'fast' cannot be used .*no kernel has this name"):
        select("grouped", case, KERNELS)


def test_choice_is_logged_once_for_each_kernel_and_size_with_its_reason(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection._chosen.cache_clear()
    selection._log_once.cache_clear()
    config = ExpertsConfig(num_experts=N, intermediate_size=WIDTH, kernel="grouped")

    def run(tokens: int) -> None:
        index_TK, weight_TK = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
        Experts(config, D)(torch.ones(tokens, D), index_TK, weight_TK)

    with caplog.at_level(logging.INFO, logger="moesaic.layer.kernels"):
        for tokens in (1, 1, 2, 40, 50):
            run(tokens)
        monkeypatch.setenv("MOESAIC_KERNEL", "loop")
        run(1)
    assert [record.getMessage() for record in caplog.records] == [
        "expert kernel: grouped for decode on cpu in float32 (asked for by experts.kernel)",
        "expert kernel: grouped for few rows on cpu in float32 (asked for by experts.kernel)",
        "expert kernel: loop for decode on cpu in float32 (asked for by MOESAIC_KERNEL)",
    ]


@pytest.mark.parametrize("kernel", ALL)
def test_threads_do_not_change_the_result(kernel: str) -> None:
    """Sums in an order that depends on timing would end exact resume."""
    torch.manual_seed(0)
    experts = Experts(ExpertsConfig(num_experts=16, intermediate_size=24, kernel=kernel), 64)
    x_TD = torch.randn(2048, 64, requires_grad=True)
    index_TK = torch.stack([torch.randperm(16)[:6] for _ in range(2048)])
    weight_TK = torch.rand(2048, 6, requires_grad=True)
    inputs = (x_TD, weight_TK, *experts.parameters())

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(experts(x_TD, index_TK, weight_TK).square().sum(), inputs)

    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first = gradients()
        for _ in range(5):
            assert all(map(torch.equal, first, gradients()))
    finally:
        torch.set_num_threads(threads)


def test_a_kernel_that_can_not_skip_is_passed_over_where_picks_may_be_no_expert() -> None:
    needy = kernel_registry.Kernel(
        "needy", KERNELS[-1].run, lambda case: None, lambda case: "test", skips_no_expert=False
    )
    kernels = (needy, *KERNELS)
    assert select("auto", case_of(torch.ones(1, D), may_skip=False), kernels).name == "needy"
    assert select("auto", case_of(torch.ones(1, D)), kernels).name != "needy"
    with pytest.raises(UnsupportedKernel, match="needy: can't skip picks of no expert"):
        select("needy", case_of(torch.ones(1, D)), kernels)


@pytest.mark.parametrize("capacity", [None, {"factor": 1}], ids=["dropless", "capacity"])
def test_a_block_tells_its_experts_whether_picks_may_be_no_expert(capacity: dict[str, Any] | None) -> None:
    values = {"experts": {"num_experts": N, "intermediate_size": 3}, "router": {"top_k": 2}, "capacity": capacity}
    assert MoEBlock(MoESpec.from_dict(values), D).experts.may_skip == (capacity is not None)
