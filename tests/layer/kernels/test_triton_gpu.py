"""What only a GPU can show of the Triton kernel: real sizes, no waiting host, CUDA graphs, inductor, large offsets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from tests.layer.kernels.cases import KERNELS, TOLERANCE, assert_close
from torch import Tensor

from moesaic.layer.kernels import ExpertWeights, FusedActivation, Kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

TRITON, LOOP = (next(each for each in KERNELS if each.name == name) for name in ("triton", "loop"))
SILU = FusedActivation("silu", gated=True)
SIZES = {
    "d1024-f512-n64-k8": (1024, 512, 64, 8),
    "d2048-f1024-n64-k8": (2048, 1024, 64, 8),
    "d768-f2048-n8-k2": (768, 2048, 8, 2),
}


@dataclass(frozen=True)
class Layer:
    """Experts and one batch for them."""

    weights: ExpertWeights
    x_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor

    def output(self, kernel: Kernel) -> Tensor:
        return kernel.run(self.weights, self.x_TD, self.index_TK, self.weight_TK)

    def results(self, kernel: Kernel, *, double: bool = False) -> dict[str, Tensor]:
        """Output and gradients; in float64 of the same numbers if `double`."""
        names = ("up", "down", "x", "weight")
        tensors = (self.weights.up_NHD, self.weights.down_NDF, self.x_TD, self.weight_TK)
        leaves = [(each.double() if double else each.detach().clone()).requires_grad_() for each in tensors]
        up, down, x_TD, weight_TK = leaves
        layer = Layer(replace(self.weights, up_NHD=up, down_NDF=down), x_TD, self.index_TK, weight_TK)
        y_TD = layer.output(kernel)
        upstream_TD = torch.linspace(-1, 1, y_TD.numel(), device="cuda").view_as(y_TD).to(self.x_TD.dtype)
        gradients = torch.autograd.grad(y_TD, leaves, upstream_TD.to(y_TD.dtype))
        return {"y": y_TD.detach(), **dict(zip(names, gradients, strict=True))}


def make_layer(size: tuple[int, int, int, int], tokens: int, dtype: torch.dtype, *, skewed: bool = False) -> Layer:
    hidden, width, experts, top_k = size
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cuda") * shape[-1] ** -0.5).to(dtype)

    weights = ExpertWeights(normal(experts, 2 * width, hidden), normal(experts, hidden, width), SILU, fused=SILU)
    scores_TN = torch.rand(tokens, experts, generator=generator, device="cuda")
    scores_TN[:, 0] += 2 if skewed else 0
    index_TK = scores_TN.topk(top_k).indices
    x_TD = torch.randn(tokens, hidden, generator=generator, device="cuda").to(dtype)
    return Layer(weights, x_TD, index_TK, torch.rand(tokens, top_k, generator=generator, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("skewed", [False, True], ids=["balanced", "skewed"])
@pytest.mark.parametrize("tokens", [1, 4, 32, 256, 2048, 8192])
@pytest.mark.parametrize("size", SIZES)
def test_equals_loop_at_real_sizes(size: str, tokens: int, skewed: bool, dtype: torch.dtype) -> None:
    layer = make_layer(SIZES[size], tokens, dtype, skewed=skewed)
    tolerance = max(TOLERANCE[dtype], 1e-5)
    expected = layer.results(LOOP, double=True)
    assert_close({name: tensor.double() for name, tensor in layer.results(TRITON).items()}, expected, tolerance)
    with torch.no_grad():
        assert_close({"y": layer.output(TRITON).double()}, {"y": expected["y"]}, tolerance)


@pytest.mark.parametrize("tokens", [4, 512])
def test_host_never_waits(tokens: int) -> None:
    layer = make_layer(SIZES["d1024-f512-n64-k8"], tokens, torch.bfloat16)
    layer.results(TRITON)  # compiles
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.results(TRITON)
        with torch.no_grad():
            layer.output(TRITON)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("tokens", [4, 512])
def test_cuda_graph_follows_other_picks(tokens: int) -> None:
    """A captured graph has a fixed grid; how many rows an expert has is read on the device."""
    layer = make_layer(SIZES["d1024-f512-n64-k8"], tokens, torch.bfloat16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer.output(TRITON)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured_TD = layer.output(TRITON)
        layer.index_TK.copy_((layer.index_TK * 7 + 3) % 5)
        graph.replay()
        torch.testing.assert_close(captured_TD, layer.output(TRITON), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_compiles_one_graph(mode: str) -> None:
    torch.compiler.reset()
    layer = make_layer(SIZES["d1024-f512-n64-k8"], 64, torch.bfloat16)

    def run(x_TD: Tensor) -> Tensor:
        return TRITON.run(layer.weights, x_TD * 2, layer.index_TK, layer.weight_TK) + 1

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, mode=mode)
        for _ in range(3):
            actual_TD = compiled(layer.x_TD).clone()
        torch.testing.assert_close(actual_TD, run(layer.x_TD), rtol=1e-2, atol=1e-2)


def test_results_repeat_bit_by_bit() -> None:
    layer = make_layer(SIZES["d1024-f512-n64-k8"], 2048, torch.bfloat16)
    first = layer.results(TRITON)
    for _ in range(5):
        again = layer.results(TRITON)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_more_than_two_billion_weights() -> None:
    """Offsets into packed weights need 64 bits."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    hidden, width, experts = 4096, 4096, 80
    weights = torch.zeros(experts, 2 * width, hidden, dtype=torch.bfloat16, device="cuda")
    down = torch.zeros(experts, hidden, width, dtype=torch.bfloat16, device="cuda")
    weights[-1].normal_(std=hidden**-0.5)
    down[-1].normal_(std=width**-0.5)
    assert weights.numel() > 2**31
    index_TK = torch.full((128, 1), experts - 1, device="cuda")
    x_TD = torch.randn(128, hidden, device="cuda").bfloat16()
    layer = Layer(ExpertWeights(weights, down, SILU, fused=SILU), x_TD, index_TK, torch.ones(128, 1, device="cuda"))
    with torch.no_grad():
        assert_close({"y": layer.output(TRITON)}, {"y": layer.output(LOOP)}, 1e-2)
