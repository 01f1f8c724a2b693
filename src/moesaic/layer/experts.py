"""Packed experts: N feed-forward networks as stacked tensors."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from moesaic.configuration import Config
from moesaic.errors import ConfigError
from moesaic.layer.activations import ACTIVATIONS, clamped_swiglu, gated, swiglu_double
from moesaic.layer.kernels import KERNELS, ExpertWeights, FusedActivation, Kernel, KernelName, run_experts
from moesaic.layer.kernels.activation import FusedName

ActivationName = Literal[
    "silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "clamped_swiglu", "swiglu_double"
]

_FUSED: dict[ActivationName, FusedName] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "clamped_swiglu": "clamped_swiglu",
}


class ExpertsConfig(Config):
    """The routed experts of a layer.

    Attributes:
        num_experts: N.
        intermediate_size: hidden width F of one expert.
        activation: activation by its name in HF configs; "clamped_swiglu" is gpt-oss's. "swiglu_double" has a second gate
            projection, four matrices instead of three: down(linear(x) * swish(gate(x)) * up(x)), as OpenMoE's code.
        gated: gate and up projections (GLU) instead of a single up projection.
        bias: projections have biases.
        swiglu_alpha: sigmoid gain of "clamped_swiglu".
        swiglu_limit: clamp of "clamped_swiglu".
        kernel: how the experts are computed; "auto" takes the best kernel that can (docs/kernels.md). The environment
            variable MOESAIC_KERNEL has the last word.
    """

    num_experts: PositiveInt
    intermediate_size: PositiveInt
    activation: ActivationName = "silu"
    gated: bool = True
    bias: bool = False
    swiglu_alpha: float | None = None
    swiglu_limit: float | None = Field(default=None, gt=0)
    kernel: KernelName = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> ExpertsConfig:
        clamped = self.activation == "clamped_swiglu"
        if clamped and not self.gated:
            raise ConfigError("gated", False, "does not go with clamped_swiglu", "set gated: true")
        if self.activation == "swiglu_double" and not self.gated:
            raise ConfigError("gated", False, "does not go with swiglu_double", "set gated: true")
        for name in ("swiglu_alpha", "swiglu_limit"):
            value = getattr(self, name)
            if clamped and value is None:
                raise ConfigError(name, None, "is required by clamped_swiglu", "gpt-oss uses 1.702 and 7.0")
            if not clamped and value is not None:
                raise ConfigError(name, value, f"is not used by activation {self.activation}", "remove it")
        return self

    @property
    def parts(self) -> int:
        """Matrices in the first projection: up; gate and up; or linear, gate and up."""
        return 3 if self.activation == "swiglu_double" else 2 if self.gated else 1


class Experts(nn.Module):
    """N experts with packed weights, called as transformers calls them.

    Parameters: `gate_up_proj` (N, 2F, D), gate rows first, or `up_proj` (N, F, D); `down_proj` (N, D, F); with biases
    `gate_up_proj_bias` (N, 2F) or `up_proj_bias` (N, F), and `down_proj_bias` (N, D). With "swiglu_double" `gate_up_proj` is
    (N, 3F, D): linear, gate and up rows. The flags `has_gate`, `has_bias`,
    `is_transposed` and `is_concatenated` describe this layout in transformers' terms.

    Attributes:
        may_skip: whether picks may be no expert; set by the block that owns the experts.
        parts: matrices in the first projection, 1 to 3.
        fused_activation: what happens between the projections, for kernels that compute it themselves; None if none knows.
    """

    may_skip: bool = True
    fused_activation: FusedActivation | None

    def __init__(self, config: ExpertsConfig, hidden_size: int) -> None:
        super().__init__()
        self.kernel = config.kernel
        self.num_experts = config.num_experts
        self.hidden_dim, self.intermediate_dim = hidden_size, config.intermediate_size
        self.has_gate, self.has_bias, self.parts = config.gated, config.bias, config.parts
        self.is_transposed, self.is_concatenated = False, True
        if config.swiglu_alpha is not None and config.swiglu_limit is not None:
            self.act_fn = None
            self._gate = partial(clamped_swiglu, alpha=config.swiglu_alpha, limit=config.swiglu_limit)
        elif config.activation == "swiglu_double":
            self.act_fn, self._gate = None, swiglu_double
        else:
            self.act_fn = ACTIVATIONS[config.activation]
            self._gate = partial(gated, activation=self.act_fn)
        fused = _FUSED.get(config.activation)
        self.fused_activation = (
            None
            if fused is None
            else FusedActivation(fused, config.gated, alpha=config.swiglu_alpha, limit=config.swiglu_limit)
        )
        count, width = config.num_experts, config.intermediate_size
        up_width = config.parts * width
        up_name = "gate_up_proj" if config.gated else "up_proj"
        self.register_parameter(up_name, nn.Parameter(torch.empty(count, up_width, hidden_size)))
        self.down_proj = nn.Parameter(torch.empty(count, hidden_size, width))
        if config.bias:
            self.register_parameter(f"{up_name}_bias", nn.Parameter(torch.empty(count, up_width)))
            self.down_proj_bias = nn.Parameter(torch.empty(count, hidden_size))
        self.reset_parameters()

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """What `kernel` may name, in order of preference."""
        return KERNELS

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal weights of the given standard deviation, zero biases."""
        for name, parameter in self.named_parameters():
            if name.endswith("_bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)

    def forward(
        self, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, *, merge_GN: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of the picked experts for each token, y_TD; an index of N picks no expert.

        With `merge_GN`, indices count G experts instead, whose parameters are sums of all N experts' with these weights.
        """
        return run_experts(
            self.kernel,
            ExpertWeights.of(self) if merge_GN is None else ExpertWeights.whole(self).merged(merge_GN),
            hidden_TD,
            index_TK,
            weight_TK,
            may_skip=self.may_skip,
            kernels=self.kernels,
        )

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self._gate(gate_up)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, intermediate_size={self.intermediate_dim}, kernel={self.kernel}"
