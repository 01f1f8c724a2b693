"""How experts get their input when it is not simply a token for each pick: slots of mixed tokens, or merged experts.

Both come down to the experts' ordinary call, so that every kernel serves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moesaic.layer.kernels import ExpertWeights, run_experts


class Assignment(Protocol):
    """Runs the experts in place of the call with `index_TK` and `weight_TK`."""

    def run(self, experts: nn.Module, x_TD: Tensor) -> Tensor:
        """y_TD."""
        ...


@dataclass(frozen=True)
class Slots:
    """Experts process slots, each a mix of a sequence's tokens, and tokens get a mix of the slots' outputs (Soft MoE).

    L is the length of a sequence and P the number of its slots; slot p belongs to expert p // (P / N).

    Attributes:
        dispatch_BLP: share of each token in each slot.
        combine_BLP: share of each slot's output in each token's output.
        num_experts: N.
    """

    dispatch_BLP: Tensor
    combine_BLP: Tensor
    num_experts: int

    def run(self, experts: nn.Module, x_TD: Tensor) -> Tensor:
        batch, length, slots = self.dispatch_BLP.shape
        width = x_TD.shape[-1]
        x_BLD = x_TD.view(batch, length, width)
        slot_BPD = torch.einsum("blp,bld->bpd", self.dispatch_BLP.to(x_TD.dtype), x_BLD)
        expert_P = torch.arange(slots, device=x_TD.device) // (slots // self.num_experts)
        index_S1 = expert_P.repeat(batch).unsqueeze(-1)
        one_S1 = torch.ones_like(index_S1, dtype=self.combine_BLP.dtype)
        rows_SD = experts(slot_BPD.reshape(batch * slots, width), index_S1, one_S1)
        combine_BLP = self.combine_BLP.to(rows_SD.dtype)
        y_BLD = torch.einsum("blp,bpd->bld", combine_BLP, rows_SD.view(batch, slots, width))
        # Autocast runs the sums in half precision and leaves them there.
        return y_BLD.reshape(x_TD.shape).to(x_TD.dtype)


@dataclass(frozen=True)
class Merge:
    """Each group of tokens passes one expert whose parameters are a weighted sum of all experts' (SMEAR, Lory).

    Attributes:
        weight_GN: weight of each expert in each group's merged expert.
        group_T: group of each token, int64; G for tokens that pass none.
    """

    weight_GN: Tensor
    group_T: Tensor

    def run(self, experts: nn.Module, x_TD: Tensor) -> Tensor:
        weights = ExpertWeights.of(experts).merged(self.weight_GN)
        one_T1 = torch.ones(self.group_T.shape[0], 1, dtype=self.weight_GN.dtype, device=x_TD.device)
        return run_experts(getattr(experts, "kernel", "auto"), weights, x_TD, self.group_T.unsqueeze(-1), one_T1)
