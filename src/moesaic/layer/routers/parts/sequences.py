"""Seeing flattened tokens as sequences again: what routers that look at more than one token share."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from moesaic.layer.record import RoutingContext

Scope = Literal["sequence", "batch"]


def sequences(num_tokens: int, context: RoutingContext | None) -> tuple[int, int]:
    """(B, L): number and padded length of the sequences; one sequence without a context."""
    batch = 1 if context is None else context.batch_size
    return batch, num_tokens // batch


def real_tokens(x_TD: Tensor, context: RoutingContext | None, scope: Scope = "sequence") -> Tensor:
    """True for real tokens and False for padding, shape (B, L), or (1, T) for all sequences together."""
    mask_T = None if context is None else context.mask_T
    if mask_T is None:
        mask_T = torch.ones(x_TD.shape[0], dtype=torch.bool, device=x_TD.device)
    return mask_T.view(sequences(x_TD.shape[0], context) if scope == "sequence" else (1, x_TD.shape[0]))


def mean_of_tokens(x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean over the real tokens of each sequence, x_BD; 0 for a sequence of padding only."""
    mask_BL1 = mask_BL.unsqueeze(-1)
    # Not a product with the mask: padding may hold anything, also infinity.
    total_BD = x_BLD.masked_fill(~mask_BL1, 0).sum(1)
    return total_BD / mask_BL1.sum(1).clamp(min=1)


def take(scores_GLN: Tensor, mask_GL: Tensor, capacity_G: Tensor) -> Tensor:
    """Which tokens each expert takes: the `capacity_G` real ones of each group with its largest scores, (G, L, N)."""
    mask_GL1 = mask_GL.unsqueeze(-1)
    order_GLN = best_first(scores_GLN, mask_GL1)
    rank_L = torch.arange(scores_GLN.shape[1], device=scores_GLN.device)
    rank_GLN = torch.empty_like(order_GLN).scatter(1, order_GLN, rank_L.view(1, -1, 1).expand_as(order_GLN))
    return (rank_GLN < capacity_G.view(-1, 1, 1)) & mask_GL1


def best_first(scores_GLN: Tensor, mask_GL1: Tensor) -> Tensor:
    """Tokens of each group from the largest to the lowest score with each expert; ties go to the earlier token."""
    return scores_GLN.masked_fill(~mask_GL1, -math.inf).sort(dim=1, descending=True, stable=True).indices
