"""Experts in transformers: our module under its `experts_implementation` switch, and our kernels for its modules."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from moesaic.errors import UnsupportedKernel
from moesaic.hf.compat import (
    may_pick_no_expert,
    register_experts_function,
    skip_no_expert,
    use_experts_implementation,
)
from moesaic.hf.expert_kernels import SKIP_NO_EXPERT, model_kernels
from moesaic.layer import Experts, ExpertsConfig, MoESpec
from moesaic.layer.kernels import Case, ExpertWeights, Kernel, run_experts, select

IMPLEMENTATION = "moesaic"

_SKIP_NO_EXPERT = SKIP_NO_EXPERT | {"eager", IMPLEMENTATION}


def supports_no_expert(name: str) -> bool:
    """Whether an `experts_implementation` computes nothing for picks of no expert."""
    return name in _SKIP_NO_EXPERT


def check_implementation(name: str, spec: MoESpec) -> None:
    """Refuse an `experts_implementation` that would compute garbage for picks of no expert.

    Raises:
        UnsupportedKernel: if the router, capacity or depth of `spec` makes such picks and `name` is not known to skip them.
    """
    if spec.may_skip and not supports_no_expert(name):
        parts = {f"router {spec.router.type}": spec.router.may_skip, "capacity": spec.capacity, "depth": spec.depth}
        part = next(name for name, skips in parts.items() if skips)
        known = ", ".join(sorted(_SKIP_NO_EXPERT))
        raise UnsupportedKernel(
            f"experts_implementation = {name!r} is not known to skip picks of no expert, which the {part} of this model "
            f"makes; choose one of {known}"
        )


@use_experts_implementation
class _SwitchedExperts(Experts):
    def __init__(self, config: PreTrainedConfig, experts: ExpertsConfig, hidden_size: int) -> None:
        super().__init__(experts, hidden_size)


class MoesaicExperts(_SwitchedExperts):
    """`Experts` that obeys `set_experts_implementation`.

    "moesaic" (the default of our models) and "eager" run the kernel that the spec names, which may be one of
    transformers' too; "grouped_mm", "batched_mm" and the other names run transformers' own functions on the same
    parameters, whatever the spec names.

    Args:
        config: carries the switch.
        experts: the experts.
        hidden_size: D.
        may_skip: whether picks may be no expert.
    """

    may_skip: bool

    def __init__(
        self, config: PreTrainedConfig, experts: ExpertsConfig, hidden_size: int, *, may_skip: bool = True
    ) -> None:
        super().__init__(config, experts, hidden_size)
        if may_skip:
            skip_no_expert(self)
        # The decorator describes a class; here gate and bias belong to the instance.
        self.has_gate, self.has_bias = experts.gated, experts.bias

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Ours and those of transformers."""
        return model_kernels(may_skip=self.may_skip)

    def forward(
        self, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, *, merge_GN: Tensor | None = None
    ) -> Tensor:
        if merge_GN is None:
            return super().forward(hidden_TD, index_TK, weight_TK)
        # Transformers' functions know no merged experts.
        return Experts.forward(cast(Experts, self), hidden_TD, index_TK, weight_TK, merge_GN=merge_GN)


def moesaic_experts_forward(module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """What `experts_implementation="moesaic"` runs, on our experts and on those of every stock family.

    Our experts name their kernel in the spec. Stock modules may carry an attribute `kernel` with a name; without one
    the choice is "auto". The variable MOESAIC_KERNEL overrides both.

    Raises:
        UnsupportedKernel: if the module does something between or after the projections that kernels don't know.
    """
    weights, (kernels, may_skip) = ExpertWeights.of(module), _choices(module)
    return run_experts(
        vars(module).get("kernel", "auto"),
        weights,
        hidden_TD,
        index_TK,
        weight_TK,
        may_skip=may_skip,
        kernels=kernels,
    )


def kernel_of(module: Any, weights: ExpertWeights, hidden_TD: Tensor, top_k: int) -> str:
    """Name of the kernel that `moesaic_experts_forward` runs for such tokens."""
    kernels, may_skip = _choices(module)
    index_TK = torch.zeros(hidden_TD.shape[0], top_k, dtype=torch.int64)
    case = Case.of(weights, hidden_TD, index_TK, index_TK.to(hidden_TD.dtype), may_skip=may_skip)
    return select(vars(module).get("kernel", "auto"), case, kernels).name


def _choices(module: Any) -> tuple[tuple[Kernel, ...], bool]:
    """The kernels for a module, and whether its picks may be no expert."""
    may_skip = module.may_skip if isinstance(module, Experts) else may_pick_no_expert(module)
    return model_kernels(may_skip=may_skip), may_skip


def register() -> None:
    """Make "moesaic" a legal `experts_implementation` everywhere in transformers."""
    register_experts_function(IMPLEMENTATION, moesaic_experts_forward)
