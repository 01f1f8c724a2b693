"""How experts compute: kernels behind one registry, chosen by capability.

Every kernel is a function `run(weights, x_TD, index_TK, weight_TK) -> y_TD` that equals the `loop` kernel within
rounding. To add one: its file, a `Kernel` line below, a row in tests/layer/test_kernels.py.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic.errors import UnsupportedKernel
from moesaic.layer.kernels import grouped, loop
from moesaic.layer.kernels.weights import ExpertWeights

logger = logging.getLogger(__name__)

KernelName = Literal["auto", "loop", "grouped"]


@dataclass(frozen=True)
class Kernel:
    """One way to compute experts.

    Attributes:
        name: what a config calls it.
        run: the computation.
        refuses: the reason why it can't take these weights and input, or None if it can.
        why: said in the log when it is chosen.
        skips_no_expert: whether it takes picks of no expert, which add nothing to output and gradients.
    """

    name: str
    run: Callable[[ExpertWeights, Tensor, Tensor, Tensor], Tensor]
    refuses: Callable[[ExpertWeights, Tensor], str | None]
    why: str
    skips_no_expert: bool


def _refuses_nothing(weights: ExpertWeights, x_TD: Tensor) -> None:
    return None


def _grouped_refuses(weights: ExpertWeights, x_TD: Tensor) -> str | None:
    if not x_TD.dtype.is_floating_point or not weights.up_NHD.dtype.is_floating_point:
        return f"needs floating point, got {x_TD.dtype} input and {weights.up_NHD.dtype} weights"
    return None


# In order of preference.
KERNELS: tuple[Kernel, ...] = (
    Kernel(
        "grouped",
        grouped.run,
        _grouped_refuses,
        "sorts rows by expert once; forward and backward in packed tensors",
        skips_no_expert=True,
    ),
    Kernel("loop", loop.run, _refuses_nothing, "the specification; differentiable twice", skips_no_expert=True),
)


def select(name: str, weights: ExpertWeights, x_TD: Tensor, *, may_skip: bool = True) -> Kernel:
    """The kernel that a config asks for, or for "auto" the first one that takes this input.

    Args:
        name: kernel name or "auto".
        weights: the experts.
        x_TD: hidden states.
        may_skip: whether picks may be no expert.

    Raises:
        UnsupportedKernel: for an unknown name or a kernel that refuses, with every reason.
    """
    reasons = {}
    for kernel in KERNELS:
        if name not in ("auto", kernel.name):
            continue
        reason = kernel.refuses(weights, x_TD)
        if may_skip and not kernel.skips_no_expert:
            reason = "can't skip picks of no expert, which this router or capacity makes"
        if reason is None:
            if not torch.compiler.is_compiling():
                _log_choice(kernel.name, kernel.why if name == "auto" else "asked for by the configuration")
            return kernel
        reasons[kernel.name] = reason
    known = ", ".join(kernel.name for kernel in KERNELS)
    detail = "; ".join(f"{kernel}: {reason}" for kernel, reason in reasons.items()) or "no kernel has this name"
    raise UnsupportedKernel(f"experts.kernel = {name!r} cannot be used ({detail}); choose auto or one of {known}")


def run_experts(
    name: str, weights: ExpertWeights, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, *, may_skip: bool = True
) -> Tensor:
    """Select a kernel and run it.

    Args:
        name: kernel name or "auto".
        weights: the experts.
        x_TD: hidden states.
        index_TK: picks in [0, N]; N stands for no expert.
        weight_TK: combine weights.
        may_skip: whether a pick may be N.

    Returns:
        y_TD in the dtype of `x_TD`.
    """
    return select(name, weights, x_TD, may_skip=may_skip).run(weights, x_TD, index_TK, weight_TK)


@functools.cache
def _log_choice(name: str, why: str) -> None:
    logger.info("expert kernel: %s (%s)", name, why)


__all__ = ["KERNELS", "ExpertWeights", "Kernel", "KernelName", "run_experts", "select"]
