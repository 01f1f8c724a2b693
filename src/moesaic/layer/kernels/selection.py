"""Which kernel computes a call: what a call is, what a kernel says of itself, and how one is chosen."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moesaic.errors import UnsupportedKernel
from moesaic.layer.kernels.activation import FusedActivation
from moesaic.layer.kernels.weights import ExpertWeights

logger = logging.getLogger("moesaic.layer.kernels")

VARIABLE = "MOESAIC_KERNEL"
FIELD = "experts.kernel"
# Registered by the hf room, where modules follow transformers' conventions.
_OF_MODELS = frozenset({"grouped_mm", "batched_mm", "sonicmoe", "deepgemm"})
SizeClass = Literal["decode", "few rows", "many rows"]


class Case(NamedTuple):
    """All that a choice may depend on. Hashable, so that choosing is a look-up on the decoding path.

    Attributes:
        device: device type of the input, "cpu" or "cuda".
        capability: compute capability of a CUDA device, (0, 0) elsewhere.
        dtype: of the input.
        weight_dtype: of the expert weights.
        autocast: dtype that autocast computes in, None where it is off.
        tokens: T.
        picks: K.
        experts: N.
        hidden: D.
        width: F, rows of the second projection's input.
        fused: the activation if it is a known one.
        bias: projections have biases.
        transposed: weights are stored (in, out), so that the (out, in) views have strides.
        needs_grad: a backward pass may follow.
        may_skip: picks may be no expert.
        compiling: torch.compile is tracing.
    """

    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    weight_dtype: torch.dtype
    autocast: torch.dtype | None
    tokens: int
    picks: int
    experts: int
    hidden: int
    width: int
    fused: FusedActivation | None
    bias: bool
    transposed: bool
    needs_grad: bool
    may_skip: bool
    compiling: bool

    @classmethod
    def of(
        cls, weights: ExpertWeights, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, *, may_skip: bool = True
    ) -> Case:
        """The case of one call."""
        up_NHD, down_NDF = weights.up_NHD, weights.down_NDF
        device = x_TD.device
        tokens, picks = index_TK.shape
        experts, hidden, width = down_NDF.shape
        return cls(
            device.type,
            _capability(device.index) if device.type == "cuda" else (0, 0),
            x_TD.dtype,
            up_NHD.dtype,
            torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None,
            tokens,
            picks,
            experts,
            hidden,
            width,
            weights.fused,
            weights.up_bias_NH is not None,
            up_NHD.stride(2) != 1,
            torch.is_grad_enabled() and _requires_grad(weights, x_TD, weight_TK),
            may_skip,
            torch.compiler.is_compiling(),
        )

    @property
    def rows(self) -> int:
        """S, rows that experts compute if every pick is an expert."""
        return self.tokens * self.picks

    @property
    def rows_per_expert(self) -> float:
        """Mean S / N; a layer that is read once for a few rows is bound by memory, not by arithmetic."""
        return self.rows / self.experts

    @property
    def size(self) -> SizeClass:
        """How the log calls it: up to 2 rows per expert, up to 32, more."""
        if self.rows <= 2 * self.experts:
            return "decode"
        return "few rows" if self.rows <= 32 * self.experts else "many rows"


@dataclass(frozen=True, eq=False)
class Kernel:
    """One way to compute experts.

    Attributes:
        name: what a config calls it.
        run: the computation, `run(weights, x_TD, index_TK, weight_TK) -> y_TD`.
        refuses: the reason why it can't compute a case, or None if it can.
        suits: the reason why "auto" takes it for a case that it can compute, by capability and measured size; None
            where another is better.
        skips_no_expert: whether it takes picks of no expert, which add nothing to output and gradients.
    """

    name: str
    run: Callable[[ExpertWeights, Tensor, Tensor, Tensor], Tensor]
    refuses: Callable[[Case], str | None]
    suits: Callable[[Case], str | None]
    skips_no_expert: bool = True


def select(name: str, case: Case, kernels: tuple[Kernel, ...]) -> Kernel:
    """The kernel that the environment or a config asks for, or for "auto" the first one that can and suits.

    Args:
        name: kernel name or "auto", from a config. The variable MOESAIC_KERNEL overrides it.
        case: what is to be computed.
        kernels: what there is, in order of preference.

    Raises:
        UnsupportedKernel: for an unknown name or a kernel that refuses, with every reason.
    """
    asked, source = _asked(name)
    if not case.compiling:
        return _chosen(asked, source, case, kernels)
    kernel, why = _choose(asked, source, case, kernels)
    # Not the size class: asking for it would compile a graph for each.
    _announce(kernel.name, "compiled code", case.device, str(case.dtype), why)
    return kernel


def _asked(name: str) -> tuple[str, str]:
    variable = _variable()
    return (variable, VARIABLE) if variable else (name, FIELD)


@torch.compiler.assume_constant_result
def _variable() -> str:
    return os.environ.get(VARIABLE, "")


def _choose(name: str, source: str, case: Case, kernels: tuple[Kernel, ...]) -> tuple[Kernel, str]:
    reasons: list[str] = []
    for kernel in kernels:
        if name not in ("auto", kernel.name):
            continue
        reason = kernel.refuses(case)
        if reason is None and case.may_skip and not kernel.skips_no_expert:
            reason = "can't skip picks of no expert, which this router or capacity makes"
        if reason is None:
            if name != "auto":
                return kernel, f"asked for by {source}"
            why = kernel.suits(case)
            if why is not None:
                return kernel, why
            reason = f"does not suit {case.size}"
        reasons.append(f"{kernel.name}: {reason}")
    known = ", ".join(kernel.name for kernel in kernels)
    missing = "it is transformers' own, for models only" if name in _OF_MODELS else "no kernel has this name"
    detail = "; ".join(reasons) or missing
    raise UnsupportedKernel(f"{source} = {name!r} cannot be used ({detail}); choose auto or one of {known}")


@functools.lru_cache(maxsize=4096)
def _chosen(name: str, source: str, case: Case, kernels: tuple[Kernel, ...]) -> Kernel:
    kernel, why = _choose(name, source, case, kernels)
    _announce(kernel.name, case.size, case.device, str(case.dtype), why)
    return kernel


@torch.compiler.assume_constant_result
def _announce(name: str, size: str, device: str, dtype: str, why: str) -> None:
    _log_once(name, size, device, dtype, why)


@functools.cache
def _log_once(name: str, size: str, device: str, dtype: str, why: str) -> None:
    logger.info("expert kernel: %s for %s on %s in %s (%s)", name, size, device, dtype.removeprefix("torch."), why)


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> tuple[int, int]:
    return _capability_of(torch.cuda.current_device() if index is None else index)


@functools.cache
def _capability_of(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _requires_grad(weights: ExpertWeights, x_TD: Tensor, weight_TK: Tensor) -> bool:
    if x_TD.requires_grad or weight_TK.requires_grad or weights.up_NHD.requires_grad or weights.down_NDF.requires_grad:
        return True
    biases = (weights.up_bias_NH, weights.down_bias_ND)
    return any(bias is not None and bias.requires_grad for bias in biases)
