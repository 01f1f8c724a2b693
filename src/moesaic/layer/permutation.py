"""Order rows by expert, and restore token order: the permutation between a record and the experts' input.

`order` groups the T*K picks so that each expert's rows are contiguous; `gather` copies tokens to those rows, and
`restore` takes the experts' outputs back to tokens, weighted and summed over the picks. All are deterministic, forward
and backward, on every device and with any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """A permutation of the S = T*K picks into expert order; picks without an expert come last.

    Attributes:
        pick_S: which pick (t * K + k) stands at each row.
        row_S: its inverse: at which row each pick stands.
        counts_N: number of rows of each expert; rows past their sum belong to no expert.
        top_k: K.
    """

    pick_S: Tensor
    row_S: Tensor
    counts_N: Tensor
    top_k: int

    @property
    def token_S(self) -> Tensor:
        """Token of each row."""
        return self.pick_S // self.top_k


def order(index_TK: Tensor, num_experts: int) -> Order:
    """Sort picks by expert, stable in token order.

    Args:
        index_TK: picks, each in [0, num_experts]; `num_experts` stands for no expert.
        num_experts: N.
    """
    expert_S = index_TK.reshape(-1)
    pick_S = expert_S.argsort(stable=True)
    row_S = torch.empty_like(pick_S)
    row_S[pick_S] = torch.arange(pick_S.numel(), device=pick_S.device)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_S.device)
    counts = counts.scatter_add(0, expert_S, torch.ones_like(expert_S))
    return Order(pick_S=pick_S, row_S=row_S, counts_N=counts[:num_experts], top_k=index_TK.shape[-1])


def gather(x_TD: Tensor, order: Order) -> Tensor:
    """Copy each token to the rows of its picks, rows_SD, in expert order."""
    return _Gather.apply(x_TD, order.token_S, order.row_S, order.top_k)


def restore(rows_SD: Tensor, order: Order, weight_TK: Tensor) -> Tensor:
    """Weight the experts' outputs and sum them for each token.

    The sum runs over K in at least float32 and is cast once, to the dtype of `rows_SD`.

    Args:
        rows_SD: outputs in expert order; rows that belong to no expert must be zero.
        order: the permutation that `order` gave.
        weight_TK: combine weights.

    Returns:
        y_TD.
    """
    picks_TKD = _Unsort.apply(rows_SD, order.pick_S, order.row_S).view(*weight_TK.shape, rows_SD.shape[-1])
    accumulate = torch.promote_types(rows_SD.dtype, torch.float32)
    return (picks_TKD.to(accumulate) * weight_TK.to(accumulate).unsqueeze(-1)).sum(1).to(rows_SD.dtype)


# torch's own backward of indexing adds with atomics: with several threads the order of the K terms, and so the rounding,
# would differ from run to run. Both backward passes here are plain gathers.


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, token_S: Tensor, row_S: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(row_S)
        ctx.top_k = top_k
        return x_TD[token_S]

    @staticmethod
    def backward(ctx, grad_SD: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (row_S,) = ctx.saved_tensors
        return grad_SD[row_S].view(-1, ctx.top_k, grad_SD.shape[-1]).sum(1), None, None, None


class _Unsort(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_SD: Tensor, pick_S: Tensor, row_S: Tensor) -> Tensor:
        ctx.save_for_backward(pick_S)
        return rows_SD[row_S]

    @staticmethod
    def backward(ctx, grad_SD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (pick_S,) = ctx.saved_tensors
        return grad_SD[pick_S], None, None
