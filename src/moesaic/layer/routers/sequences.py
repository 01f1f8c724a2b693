"""Seeing flattened tokens as sequences again: what routers that look at more than one token share."""

from __future__ import annotations

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
