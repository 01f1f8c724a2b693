"""Even parts of a size that is known beforehand: the host waits for nothing, and empty rows travel too."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moesaic.dist.exchange.pairs import Pairs, meets, pairs_at


def padded_pairs(index_TK: Tensor, num_experts: int, size: int, rows_per_rank: int) -> Pairs:
    """Pairs of tokens and ranks in a block of rows for each rank, whose rest is rows of zeros.

    Args:
        index_TK: picks, N for no expert.
        num_experts: N over all ranks.
        size: number of ranks P.
        rows_per_rank: more than a rank ever gets; that a capacity keeps to this is asserted on the device.
    """
    goes_PT = meets(index_TK, num_experts, size)
    within_PT = goes_PT.cumsum(1) - 1
    torch.ops.aten._assert_async.msg((goes_PT.sum(1) <= rows_per_rank).all(), "more tokens for a rank than its capacity")
    start_P1 = torch.arange(size, device=index_TK.device).unsqueeze(-1) * rows_per_rank
    pairs = pairs_at(within_PT + start_P1, goes_PT, size * rows_per_rank, index_TK.shape[1])
    return replace(pairs, has_gaps=True)
