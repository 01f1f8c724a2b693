"""Load statistics of a record, for logs and reports."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.layer.record import Routing


def expert_load(routing: Routing, mask_T: Tensor | None = None) -> Tensor:
    """Number of picks of each expert, int64 (N,); padding and picks of no expert are not counted."""
    index_TK = routing.index_TK if mask_T is None else routing.index_TK[mask_T]
    return torch.bincount(index_TK.reshape(-1), minlength=routing.num_experts + 1)[: routing.num_experts]


def max_violation(load_N: Tensor) -> Tensor:
    """MaxVio = max load / mean load - 1 (arXiv 2408.15664, eq. 4).

    0 when balanced or without picks, N / K - 1 at collapse.
    """
    load_N = load_N.to(torch.float64)
    mean = load_N.mean()
    return (load_N.max() - mean) / mean.clamp(min=torch.finfo(torch.float64).tiny)


def routing_entropy(load_N: Tensor) -> Tensor:
    """Entropy of the load distribution divided by log N: 1 when balanced, 0 when one expert takes all."""
    share_N = load_N.to(torch.float64) / load_N.sum().clamp(min=1)
    return torch.special.entr(share_N).sum() / torch.log(torch.tensor(max(load_N.numel(), 2), dtype=torch.float64))
