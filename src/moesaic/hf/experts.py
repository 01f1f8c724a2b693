"""Experts in transformers: our module under its `experts_implementation` switch, and our kernels for its modules."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedConfig

from moesaic.errors import UnsupportedKernel
from moesaic.hf.compat import register_experts_function, use_experts_implementation
from moesaic.layer import Experts, ExpertsConfig
from moesaic.layer.kernels import ExpertWeights, run_experts

IMPLEMENTATION = "moesaic"


@use_experts_implementation
class _SwitchedExperts(Experts):
    def __init__(self, config: PreTrainedConfig, experts: ExpertsConfig, hidden_size: int) -> None:
        super().__init__(experts, hidden_size)


class MoesaicExperts(_SwitchedExperts):
    """`Experts` that obeys `set_experts_implementation`.

    "moesaic" (the default of our models) and "eager" run the kernel that the spec names; "grouped_mm", "batched_mm"
    and the other names run transformers' own functions on the same parameters.
    """

    def __init__(self, config: PreTrainedConfig, experts: ExpertsConfig, hidden_size: int) -> None:
        super().__init__(config, experts, hidden_size)
        # The decorator describes a class; here gate and bias belong to the instance.
        self.has_gate, self.has_bias = experts.gated, experts.bias


def moesaic_experts_forward(module, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """What `experts_implementation="moesaic"` runs, on our experts and on those of every stock family.

    Raises:
        UnsupportedKernel: if the module does something between or after the projections that kernels don't know.
    """
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedKernel(
            f'{type(module).__name__} normalises each expert\'s output; use experts_implementation="grouped_mm"'
        )
    kernel = getattr(module, "kernel", "auto")
    return run_experts(kernel, ExpertWeights.of(module), hidden_TD, index_TK, weight_TK)


def register() -> None:
    """Make "moesaic" a legal `experts_implementation` everywhere in transformers."""
    register_experts_function(IMPLEMENTATION, moesaic_experts_forward)
