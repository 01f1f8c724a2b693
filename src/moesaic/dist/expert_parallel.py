"""Expert parallelism: tokens travel to the processes that hold their experts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


class _Trip:
    def __init__(self, experts: int, group: dist.ProcessGroup, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor):
        self.group, self.x_TD = group, x_TD
        ranks = dist.get_world_size(group)
        local = experts // ranks
        owner_TK = index_TK // local
        needs_TR = torch.stack([(owner_TK == rank).any(1) for rank in range(ranks)], 1)
        self.token_S = torch.cat([needs_TR[:, rank].nonzero().squeeze(1) for rank in range(ranks)])
        counts_R = needs_TR.sum(0)
        received_R = torch.empty_like(counts_R)
        dist.all_to_all_single(received_R, counts_R, group=group)
        self.sent, self.received = counts_R.tolist(), received_R.tolist()
        rank_S = torch.repeat_interleave(torch.arange(ranks), counts_R)
        index_SK = index_TK[self.token_S] - (rank_S * local)[:, None]
        index_SK = torch.where((index_SK < 0) | (index_SK >= local), local, index_SK)
        index_RK = torch.empty(sum(self.received), index_TK.shape[1], dtype=index_TK.dtype)
        dist.all_to_all_single(index_RK, index_SK.contiguous(), self.received, self.sent, group=group)
        self.arrived = self._there(x_TD[self.token_S]), index_RK, self._there(weight_TK[self.token_S])

    def _there(self, rows: Tensor) -> Tensor:
        return all_to_all_single_autograd(rows.contiguous(), self.received, self.sent, self.group)

    def arrive(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.arrived

    def combine(self, rows_RD: Tensor) -> Tensor:
        back_SD = all_to_all_single_autograd(rows_RD.contiguous(), self.sent, self.received, self.group)
        return torch.zeros_like(self.x_TD).index_add(0, self.token_S, back_SD)


class ExpertParallel:
    """Experts spread over a group in equal parts, in index order.

    Args:
        num_experts: N, of the whole layer.
        ep_group: the processes that hold them.
        esp_group: the processes that share each expert.
    """

    def __init__(
        self, num_experts: int, ep_group: dist.ProcessGroup, *, esp_group: dist.ProcessGroup | None = None
    ) -> None:
        self.num_experts, self.group = num_experts, ep_group

    def send(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> _Trip:
        """Send each token once to each process that holds one of its experts."""
        return _Trip(self.num_experts, self.group, x_TD, index_TK, weight_TK)
