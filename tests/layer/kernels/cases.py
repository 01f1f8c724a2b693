"""The rows of the kernel matrix: kernels of this machine, sizes, layouts, activations and the picks that break kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.hf.expert_kernels import model_kernels
from moesaic.layer.activations import swiglu_double
from moesaic.layer.kernels import Case, ExpertWeights, FusedActivation, Kernel

# All there are: ours and those that models add.
KERNELS: tuple[Kernel, ...] = model_kernels(may_skip=True)
LOOP = next(kernel for kernel in KERNELS if kernel.name == "loop")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Distance to float64, as a part of each tensor's norm: a few roundings in sequence.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# Where a clamp cuts, the derivative jumps, and a value that is rounded to half precision may fall on the other side.
AT_CLAMPS = {torch.bfloat16: 0.2, torch.float16: 0.04}


@dataclass(frozen=True)
class Size:
    """N, K, D, F and T."""

    experts: int
    picks: int
    hidden: int
    width: int
    tokens: int


SIZES = {"tiny": Size(4, 2, 6, 5, 7), "larger": Size(8, 3, 72, 40, 61)}


@dataclass(frozen=True)
class Layout:
    """What the experts look like: activation, biases, how weights are stored."""

    activate: Callable[[Tensor], Tensor]
    gated: bool
    bias: bool = False
    transposed: bool = False
    parts: int | None = None

    @property
    def up_parts(self) -> int:
        """Matrices in the first projection."""
        return self.parts or (2 if self.gated else 1)


def _fused(*arguments: Any, bias: bool = False, transposed: bool = False) -> Layout:
    fused = FusedActivation(*arguments)
    return Layout(fused, fused.gated, bias, transposed)


def _unknown_gate(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return torch.tanh(gate) * up


LAYOUTS: dict[str, Layout] = {
    "silu_gated": _fused("silu", True),
    "gelu_gated_biased": _fused("gelu", True, bias=True),
    "relu2_plain": _fused("relu2", False),
    "gelu_tanh_plain_biased": _fused("gelu_tanh", False, bias=True),
    "relu_gated_transposed": _fused("relu", True, transposed=True),
    "clamped_biased": _fused("clamped_swiglu", True, False, 1.702, 0.5, bias=True),
    "clamped_interleaved_transposed_biased": _fused(
        "clamped_swiglu", True, True, 1.702, 0.5, bias=True, transposed=True
    ),
    "unknown_gate": Layout(_unknown_gate, True),
    "swiglu_double_biased": Layout(swiglu_double, True, bias=True, parts=3),
    "unknown_plain_biased": Layout(torch.sin, False, bias=True),
}


def _distinct(size: Size, generator: torch.Generator) -> Tensor:
    return torch.rand(size.tokens, size.experts, generator=generator).topk(size.picks).indices


def _some_sentinels(size: Size, generator: torch.Generator) -> Tensor:
    index_TK = _distinct(size, generator)
    index_TK[torch.rand(index_TK.shape, generator=generator) < 0.4] = size.experts
    index_TK[1] = size.experts
    return index_TK


def _first_and_last(size: Size, generator: torch.Generator) -> Tensor:
    return torch.where(_distinct(size, generator) % 2 == 0, 0, size.experts - 1)


PICKS: dict[str, Callable[[Size, torch.Generator], Tensor]] = {
    "random": _distinct,
    "skewed": lambda size, generator: torch.full((size.tokens, size.picks), 1),
    "empty_experts": _first_and_last,
    "tied": lambda size, generator: _distinct(size, generator)[:, :1].expand(-1, size.picks).contiguous(),
    "some_sentinels": _some_sentinels,
    "nan_in_rows_of_sentinels": _some_sentinels,
    "no_rows": lambda size, generator: torch.full((size.tokens, size.picks), size.experts),
    "padded": _distinct,
    "single_token": lambda size, generator: _distinct(size, generator)[:1],
    "no_tokens": lambda size, generator: _distinct(size, generator)[:0],
}


@dataclass(frozen=True)
class Call:
    """One call of a kernel: leaves by name, what the kernel sees of them, and the gradient from above."""

    leaves: dict[str, Tensor]
    weights: ExpertWeights
    x_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    upstream_TD: Tensor

    def case(self, **options: bool) -> Case:
        return Case.of(self.weights, self.x_TD, self.index_TK, self.weight_TK, **options)

    def skip_unless(self, kernel: Kernel, case: Case | None = None) -> None:
        """Skip the test with the kernel's own reason if it can't run this."""
        reason = kernel.refuses(case or self.case())
        if reason is not None:
            pytest.skip(f"{kernel.name} {reason}")

    def output(self, kernel: Kernel) -> Tensor:
        return kernel.run(self.weights, self.x_TD, self.index_TK, self.weight_TK)

    def results(self, kernel: Kernel, run: Callable[[], Tensor] | None = None) -> dict[str, Tensor]:
        """The output, and the gradient of every leaf."""
        y_TD = self.output(kernel) if run is None else run()
        gradients = torch.autograd.grad(
            y_TD, list(self.leaves.values()), self.upstream_TD.to(y_TD.dtype), materialize_grads=True
        )
        return {"y": y_TD.detach(), **dict(zip(self.leaves, gradients, strict=True))}


def make_call(
    layout: str = "silu_gated",
    picks: str = "random",
    size: str = "tiny",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    exact: bool = False,
) -> Call:
    """The same numbers for the same arguments; with `exact` those of `dtype`, kept in float64."""
    dimensions, described = SIZES[size], LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)

    def leaf(tensor: Tensor) -> Tensor:
        tensor = tensor.to(dtype)
        return (tensor.double() if exact else tensor).to(device).requires_grad_()

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    experts, hidden, width = dimensions.experts, dimensions.hidden, dimensions.width
    up_width = described.up_parts * width
    up_NHD = normal(experts, up_width, hidden, scale=hidden**-0.5)
    down_NDF = normal(experts, hidden, width, scale=width**-0.5)
    if described.transposed:
        up_NHD, down_NDF = up_NHD.transpose(1, 2).contiguous(), down_NDF.transpose(1, 2).contiguous()
    index_TK = PICKS[picks](dimensions, generator).to(device)
    tokens = index_TK.shape[0]
    x_TD, weight_TK = normal(tokens, hidden), torch.rand(index_TK.shape, generator=generator, dtype=torch.float64)
    if picks == "nan_in_rows_of_sentinels":
        x_TD[(index_TK == experts).all(-1).cpu()] = torch.nan
    if picks == "padded":
        x_TD[tokens // 2 :], weight_TK[tokens // 2 :] = 0.0, 0.0
    leaves = {"x": leaf(x_TD), "weight": leaf(weight_TK), "up": leaf(up_NHD), "down": leaf(down_NDF)}
    if described.bias:
        leaves |= {"up_bias": leaf(normal(experts, up_width)), "down_bias": leaf(normal(experts, hidden))}
    up, down = leaves["up"], leaves["down"]
    if described.transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    weights = ExpertWeights(
        up,
        down,
        described.activate,
        leaves.get("up_bias"),
        leaves.get("down_bias"),
        described.activate if isinstance(described.activate, FusedActivation) else None,
    )
    upstream_TD = normal(tokens, hidden).to(dtype).to(torch.float64 if exact else dtype).to(device)
    return Call(leaves, weights, leaves["x"], index_TK, leaves["weight"], upstream_TD)


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, up_tolerance: float | None = None
) -> None:
    """Equal up to a part of each tensor's norm, of gradients through the gate up to `up_tolerance`; zero is zero."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        tolerance_here = tolerance if up_tolerance is None or name not in ("x", "up", "up_bias") else up_tolerance
        assert actual[name].shape == wanted.shape, name
        difference = (actual[name].to(wanted.dtype) - wanted).norm().item()
        allowed = tolerance_here * wanted.norm().item()
        assert difference <= allowed, (
            f"{name}: differs by {difference:.3g} of {wanted.norm():.3g}, allowed {allowed:.3g}"
        )


def runs(*dtypes: torch.dtype) -> list[Any]:
    """(kernel, device, dtype) for all that this machine runs; one skipped row with its reason for each other kernel."""
    rows, layouts = [], ("silu_gated", "unknown_gate")
    for kernel in KERNELS:
        found, reason = [], None
        for device in DEVICES:
            if kernel.name == "triton" and device == "cpu":
                reason = "is interpreted on a CPU, for the selection in test_triton.py"
                continue
            for dtype in dtypes or TOLERANCE:
                cases = [make_call(layout, size="larger", dtype=dtype, device=device).case() for layout in layouts]
                reasons = [kernel.refuses(case._replace(needs_grad=grad)) for case in cases for grad in (False, True)]
                if None in reasons:
                    name = str(dtype).removeprefix("torch.")
                    found.append(pytest.param(kernel, device, dtype, id=f"{kernel.name}-{device}-{name}"))
                reason = reasons[0]
        if not found:
            found = [pytest.param(kernel, None, None, id=kernel.name, marks=pytest.mark.skip(reason=f"{reason}"))]
        rows += found
    return rows
