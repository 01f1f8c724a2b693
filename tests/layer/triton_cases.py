"""What the tests of the Triton kernel share: experts, picks, and one call with all its gradients.

With a CUDA device the tests run on it. Without one they run in Triton's interpreter, which tests/conftest.py switches on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.layer.kernels import ExpertWeights, FusedActivation, run_experts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N = 4

FORMULAS = {
    "silu": FusedActivation("silu", gated=True),
    "silu_interleaved": FusedActivation("silu", gated=True, interleaved=True),
    "gelu": FusedActivation("gelu", gated=False),
    "gelu_gated": FusedActivation("gelu", gated=True),
    "gelu_tanh": FusedActivation("gelu_tanh", gated=True),
    "relu": FusedActivation("relu", gated=False),
    "relu2": FusedActivation("relu2", gated=False),
    "clamped": FusedActivation("clamped_swiglu", gated=True, alpha=1.702, limit=0.5),
    "clamped_interleaved": FusedActivation("clamped_swiglu", gated=True, interleaved=True, alpha=1.702, limit=0.5),
}


def make_weights(
    fused: FusedActivation,
    dtype: torch.dtype = torch.float32,
    *,
    hidden: int = 6,
    width: int = 5,
    bias: bool = True,
    transposed: bool = False,
    num_experts: int = N,
) -> tuple[ExpertWeights, dict[str, Tensor]]:
    """Experts and the parameters that they are views of; `transposed` stores the weights (in, out)."""
    generator = torch.Generator().manual_seed(0)
    up_width = 2 * width if fused.gated else width

    def normal(*size: int) -> Tensor:
        values = torch.randn(*size, generator=generator, dtype=torch.float64) * hidden**-0.5 * 2
        return values.to(DEVICE, dtype).requires_grad_()

    sizes = {"up": (num_experts, up_width, hidden), "down": (num_experts, hidden, width)}
    leaves = {name: normal(n, i, o) if transposed else normal(n, o, i) for name, (n, o, i) in sizes.items()}
    if bias:
        leaves |= {f"{name}_bias": normal(*size[:2]) for name, size in sizes.items()}
    up, down = (leaves[name].transpose(1, 2) if transposed else leaves[name] for name in sizes)
    return ExpertWeights(up, down, fused, leaves.get("up_bias"), leaves.get("down_bias"), fused), leaves


def output_and_gradients(
    name: str, weights: ExpertWeights, leaves: dict[str, Tensor], index_TK: Tensor, *, seed: int = 1
) -> dict[str, Tensor]:
    """The output of a kernel, and the gradient of everything that can have one."""
    generator = torch.Generator().manual_seed(seed)
    tokens, hidden, dtype = index_TK.shape[0], weights.down_NDF.shape[1], weights.up_NHD.dtype

    def normal() -> Tensor:
        return torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    x_TD, upstream_TD = normal().requires_grad_(), normal()
    weight_TK = torch.rand(index_TK.shape, generator=generator).to(DEVICE).requires_grad_()
    inputs = {"x": x_TD, "weight": weight_TK, **leaves}
    y_TD = run_experts(name, weights, x_TD, index_TK.to(DEVICE), weight_TK)
    gradients = torch.autograd.grad(y_TD, list(inputs.values()), upstream_TD, materialize_grads=True)
    return {"y": y_TD.detach(), **dict(zip(inputs, gradients, strict=True))}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor within `tolerance` of the largest value of the expected one: single small values are sums of large ones."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        atol = tolerance * max(1.0, value.abs().max().item() if value.numel() else 0.0)
        torch.testing.assert_close(actual[key], value, rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


def random_picks(tokens: int, top_k: int = 2, num_experts: int = N, **options: Any) -> Tensor:
    """Picks with no expert among them."""
    return torch.randint(0, num_experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(3), **options)
