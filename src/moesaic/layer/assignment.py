"""How experts get their input when it is not simply a token for each pick: slots of mixed tokens, or merged experts.

Both come down to the experts' ordinary call, so that every kernel serves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class ExpertsCall(Protocol):
    """The experts of a layer, wherever they are."""

    def __call__(
        self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, /, *, merge_GN: Tensor | None = None
    ) -> Tensor:
        """y_TD; with `merge_GN` the index counts G experts that are merged from all N (see `Experts`)."""
        ...


class Assignment(Protocol):
    """Runs the experts in place of the call with `index_TK` and `weight_TK`."""

    def run(self, experts: ExpertsCall, x_TD: Tensor) -> Tensor:
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

    def run(self, experts: ExpertsCall, x_TD: Tensor) -> Tensor:
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
class SlotsAcross:
    """Slots of tokens that stand at the same position of several sequences (mixture of tokens).

    A group is `group_size` sequences in a row at one position; the last groups are filled up with nothing.

    Attributes:
        slots: of the groups, ordered by their sequences and then by position; its "sequences" are the groups and its
            "tokens" their members.
        batch_size: number of sequences B.
        group_size: members of a group.
    """

    slots: Slots
    batch_size: int
    group_size: int

    def run(self, experts: ExpertsCall, x_TD: Tensor) -> Tensor:
        x_SD = group_across(x_TD, self.batch_size, self.group_size).flatten(0, 1)
        y_GMD = self.slots.run(experts, x_SD).view(-1, self.group_size, x_TD.shape[-1])
        return ungroup_across(y_GMD, self.batch_size, x_TD.shape[0])


def group_across(values_TX: Tensor, batch_size: int, group_size: int) -> Tensor:
    """Values of tokens (T, X) by group and member, (G, M, X); zeros for members that do not exist."""
    width, length = values_TX.shape[-1], values_TX.shape[0] // batch_size
    values_BLX = values_TX.view(batch_size, length, width)
    chunks = -(-batch_size // group_size)
    missing_RLX = values_BLX.new_zeros(chunks * group_size - batch_size, length, width)
    values_CMLX = torch.cat([values_BLX, missing_RLX]).view(chunks, group_size, length, width)
    return values_CMLX.transpose(1, 2).reshape(chunks * length, group_size, width)


def ungroup_across(values_GMX: Tensor, batch_size: int, num_tokens: int) -> Tensor:
    """The inverse of `group_across`, (T, X)."""
    _, group_size, width = values_GMX.shape
    length = num_tokens // batch_size
    values_CLMX = values_GMX.view(-(-batch_size // group_size), length, group_size, width)
    # A copy: compilers fail to give back a part of what they hold.
    return values_CLMX.transpose(1, 2).reshape(-1, width)[:num_tokens].clone()


@dataclass(frozen=True)
class Merge:
    """Each group of tokens passes one expert whose parameters are a weighted sum of all experts' (SMEAR, Lory).

    Attributes:
        weight_GN: weight of each expert in each group's merged expert.
        group_T: group of each token, int64; G for tokens that pass none.
        added_TD: what is added to the tokens before they pass, or None (MEO's token attention).
    """

    weight_GN: Tensor
    group_T: Tensor
    added_TD: Tensor | None = None

    def run(self, experts: ExpertsCall, x_TD: Tensor) -> Tensor:
        if self.added_TD is not None:
            x_TD = x_TD + self.added_TD.to(x_TD.dtype)
        one_T1 = torch.ones(self.group_T.shape[0], 1, dtype=self.weight_GN.dtype, device=x_TD.device)
        return experts(x_TD, self.group_T.unsqueeze(-1), one_T1, merge_GN=self.weight_GN)
