"""The one view of expert weights that kernels compute on, whatever layout the module stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial

from moesaic.errors import UnsupportedKernel
from moesaic.layer.kernels.activation import FusedActivation, recognise


@dataclass(frozen=True)
class ExpertWeights:
    """Packed weights of N experts, each (out, in) like `F.linear`, and what happens between the two projections.

    Attributes:
        up_NHD: first projection; H is 2F for gated experts and F for others.
        down_NDF: second projection.
        activate: maps the first projection's rows (S, H) to (S, F).
        up_bias_NH: bias of the first projection, or None.
        down_bias_ND: bias of the second projection, or None.
        fused: `activate` in words, for kernels that compute it themselves; None if it is an arbitrary function.
    """

    up_NHD: Tensor
    down_NDF: Tensor
    activate: Callable[[Tensor], Tensor]
    up_bias_NH: Tensor | None = None
    down_bias_ND: Tensor | None = None
    fused: FusedActivation | None = None

    @property
    def num_experts(self) -> int:
        """N."""
        return self.up_NHD.shape[0]

    @classmethod
    def of(cls, module: Any) -> ExpertWeights:
        """View the parameters of an experts module that follows transformers' conventions.

        Read are the flags `has_gate`, `has_bias`, `is_transposed` (weights stored (in, out)), the parameters
        `gate_up_proj` or `up_proj`, `down_proj`, their `_bias`, and `_apply_gate` or `act_fn`. No weight is copied: weights
        of transposed modules are views with strides, and of distributed ones what this rank holds.

        Raises:
            UnsupportedKernel: if a norm follows each expert, which no kernel here computes.
        """
        if getattr(module, "has_post_expert_norm", False):
            raise UnsupportedKernel(
                f"{type(module).__name__}.has_post_expert_norm = True cannot be computed by these kernels; "
                "set experts_implementation to eager or grouped_mm for this model"
            )
        return cls._viewed(module, _local)

    @classmethod
    def whole(cls, module: Any) -> ExpertWeights:
        """As `of`, with all experts also where they are distributed; their gradients are summed over the ranks."""
        return cls._viewed(module, _gathered)

    @classmethod
    def _viewed(cls, module: Any, plain: Callable[[Tensor], Tensor]) -> ExpertWeights:
        name = "gate_up_proj" if module.has_gate else "up_proj"
        up, down = plain(getattr(module, name)), plain(module.down_proj)
        if module.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        return cls(
            up_NHD=up,
            down_NDF=down,
            activate=module._apply_gate if module.has_gate else module.act_fn,
            up_bias_NH=plain(getattr(module, f"{name}_bias")) if module.has_bias else None,
            down_bias_ND=_padded(plain(module.down_proj_bias), module.down_proj_bias) if module.has_bias else None,
            fused=recognise(module),
        )

    def merged(self, weight_GN: Tensor) -> ExpertWeights:
        """Weights of G experts, each the sum over all N of weight_gn times expert n's parameters; differentiable."""

        def merge(packed: Tensor | None) -> Tensor | None:
            return None if packed is None else torch.einsum("gn,n...->g...", weight_GN.to(packed.dtype), packed)

        up_GHD, down_GDF = merge(self.up_NHD), merge(self.down_NDF)
        assert up_GHD is not None
        assert down_GDF is not None
        return ExpertWeights(
            up_GHD, down_GDF, self.activate, merge(self.up_bias_NH), merge(self.down_bias_ND), self.fused
        )


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _padded(bias_NX: Tensor, parameter: Tensor) -> Tensor:
    """A bias at full width, 0 where other ranks hold it: where ranks hold slices of an expert, their outputs are summed."""
    if not isinstance(parameter, DTensor) or bias_NX.shape[1] == parameter.shape[1]:
        return bias_NX
    (axis,) = (axis for axis, placement in enumerate(parameter.placements) if placement.is_shard(1))
    before = parameter.device_mesh.get_local_rank(axis) * bias_NX.shape[1]
    return nn.functional.pad(bias_NX, (before, parameter.shape[1] - before - bias_NX.shape[1]))


def _gathered(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    if parameter.requires_grad:
        parameter = cast(DTensor, parameter.view_as(parameter))
        parameter.register_hook(_settle)
    return parameter.full_tensor(grad_placements=[Partial()] * parameter.device_mesh.ndim)


def _settle(gradient: Tensor) -> None:
    """Wait for the collective that sums a gradient, which torch leaves running, before anybody drops or copies its result."""
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    if isinstance(local, AsyncCollectiveTensor):
        local.wait()
