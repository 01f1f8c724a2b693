"""Grouped GEMMs in Triton for NVIDIA GPUs from SM80.

One file a step: `schedule` sorts picks and cuts rows into blocks on the device, `gather_linear` is the first projection
with gather, bias and activation inside, `linear_scatter` the second with bias, combine weights and scatter, `decode` the
path for few rows; `hidden_gradient`, `weight_gradient` and `pick_sum` make the backward pass. `tiles` is the table of
tile sizes, `ops` and `autograd` make torch custom ops of it all.

Nothing is imported from Triton before a kernel is to run: this package also loads where Triton is not installed.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from moesaic.errors import UnsupportedKernel
from moesaic.layer.kernels.selection import Case
from moesaic.layer.kernels.weights import ExpertWeights

SCATTER_VARIABLE = "MOESAIC_TRITON_SCATTER"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(weights: ExpertWeights, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The same function as the `loop` kernel, within rounding; sums in float32.

    The picks of a token are summed in a fixed order, so that results repeat bit by bit. MOESAIC_TRITON_SCATTER=atomic
    saves the memory of S output rows and adds with atomics in no fixed order, unless
    `torch.use_deterministic_algorithms` asks for a fixed one.
    """
    from moesaic.layer.kernels.triton.run import run_triton

    output_dtype = x_TD.dtype
    if torch.is_autocast_enabled(x_TD.device.type):
        x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
    y_TD = run_triton(weights, x_TD, index_TK, weight_TK, atomic=_adds_with_atomics())
    return y_TD.to(output_dtype)


def refuses(case: Case) -> str | None:
    """The reason why a case can't be computed, or None."""
    if case.device == "cuda" and torch.version.hip is not None:
        return "is written for NVIDIA GPUs and not tried on AMD's"
    if case.device != "cuda" and not (case.device == "cpu" and _interprets()):
        return f"needs a CUDA device, got {case.device}; on a CPU it runs under TRITON_INTERPRET=1, for tests"
    if not _is_installed():
        return "needs Triton, which is not installed: pip install triton"
    if case.device == "cuda" and case.capability < (8, 0):
        major, minor = case.capability
        return f"needs compute capability 8.0 (A100) or newer, got {major}.{minor}"
    dtype = case.autocast or case.dtype
    if case.dtype not in DTYPES or dtype not in DTYPES:
        return f"computes in bfloat16, float16 or float32, got {case.dtype if case.dtype not in DTYPES else dtype}"
    if not case.weight_dtype.is_floating_point or case.weight_dtype.itemsize < 2:
        return f"needs weights in floating point of at least 16 bits, got {case.weight_dtype}"
    return None


def suits(case: Case) -> str | None:
    """The reason why "auto" takes it, or None."""
    if case.device != "cuda":
        return None
    return "Triton grouped GEMMs with gather, activation and scatter inside; not measured yet"


# torch.compile can't trace these, and their results don't change in a process.
@torch.compiler.assume_constant_result
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@torch.compiler.assume_constant_result
def _adds_with_atomics() -> bool:
    value = os.environ.get(SCATTER_VARIABLE, "sum")
    if value not in ("sum", "atomic"):
        raise UnsupportedKernel(f"{SCATTER_VARIABLE} = {value!r} is not known; set it to sum or atomic")
    return value == "atomic" and not torch.are_deterministic_algorithms_enabled()
