"""How experts compute: kernels behind one registry, chosen by capability and size.

Every kernel is a function `run(weights, x_TD, index_TK, weight_TK) -> y_TD` that equals the `loop` kernel within
rounding. To add one: its file, a `Kernel` line below (`refuses` says what it can't compute, `suits` where "auto" takes
it, both from a `Case`), its name in `KernelName`; tests/layer/test_kernels.py runs whatever is registered.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from moesaic.layer.kernels import grouped, loop, triton
from moesaic.layer.kernels.activation import FusedActivation
from moesaic.layer.kernels.native import experts as native
from moesaic.layer.kernels.selection import VARIABLE, Case, Kernel, select
from moesaic.layer.kernels.weights import ExpertWeights

KernelName = Literal["auto", "native", "triton", "grouped", "loop", "grouped_mm", "batched_mm", "sonicmoe", "deepgemm"]


def _refuses_nothing(case: Case) -> None:
    return None


def _grouped_refuses(case: Case) -> str | None:
    if not case.dtype.is_floating_point or not case.weight_dtype.is_floating_point:
        return f"needs floating point, got {case.dtype} input and {case.weight_dtype} weights"
    return None


# In order of preference.
KERNELS: tuple[Kernel, ...] = (
    Kernel("native", native.run, native.refuses, native.suits),
    Kernel("triton", triton.run, triton.refuses, triton.suits),
    Kernel(
        "grouped",
        grouped.run,
        _grouped_refuses,
        suits=lambda case: "sorts rows by expert once; forward and backward in packed tensors",
    ),
    Kernel("loop", loop.run, _refuses_nothing, suits=lambda case: "the specification; takes everything"),
)


def run_experts(
    name: str,
    weights: ExpertWeights,
    x_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    *,
    may_skip: bool = True,
    kernels: tuple[Kernel, ...] | None = None,
) -> Tensor:
    """Select a kernel and run it.

    Args:
        name: kernel name or "auto"; the variable MOESAIC_KERNEL overrides it.
        weights: the experts.
        x_TD: hidden states.
        index_TK: picks in [0, N]; N stands for no expert.
        weight_TK: combine weights.
        may_skip: whether a pick may be N.
        kernels: what may be selected; those of this package if None.

    Returns:
        y_TD in the dtype of `x_TD`.

    Raises:
        UnsupportedKernel: for an unknown name or a kernel that refuses, with every reason.
    """
    case = Case.of(weights, x_TD, index_TK, weight_TK, may_skip=may_skip)
    kernel = select(name, case, KERNELS if kernels is None else kernels)
    return kernel.run(weights, x_TD, index_TK, weight_TK)


__all__ = [
    "KERNELS",
    "VARIABLE",
    "Case",
    "ExpertWeights",
    "FusedActivation",
    "Kernel",
    "KernelName",
    "run_experts",
    "select",
]
