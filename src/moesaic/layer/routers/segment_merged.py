"""Segment-merged experts: each segment passes one merged expert, whose weights come from the segment before (Lory)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import Dependence, Router
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.parts.merging import MergingConfig, merged_routing
from moesaic.layer.routers.parts.sequences import real_tokens, sequences


class SegmentMergedConfig(MergingConfig):
    """Fields of causal segment routing (Lory, Zhong et al., arXiv 2405.03133, section 3.2).

    Segments are counted over the real tokens of a sequence. The weights of a segment are the softmax of a linear map of
    the mean token of the segment before it.

    Attributes:
        segment_length: tokens of a segment.
        first_segment: the first segment is weighed by its "own" mean token, without gradient, as in the paper; there,
            the output of a token depends on later ones, although training can't learn to use that. Or all experts have
            "equal" weights in it, and no token's output depends on later tokens.
    """

    type: Literal["segment_merged"] = "segment_merged"
    segment_length: PositiveInt = 256
    first_segment: Literal["own", "equal"] = "own"

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        return frozenset({"later_tokens"} if self.first_segment == "own" else ())

    @property
    def unservable(self) -> str | None:
        """With a cache the tokens of the segment before are gone, whatever the first segment does."""
        return "the routing of a token depends on the mean of the segment before it, which is not in the cache"

    @property
    def runs_all_experts(self) -> bool:
        return True

    def check(self, num_experts: int) -> None:
        """Any number of experts will do."""

    def build(self, hidden_size: int, num_experts: int) -> SegmentMergedRouter:
        self.check(num_experts)
        return SegmentMergedRouter(self, hidden_size, num_experts)


class SegmentMergedRouter(Router[SegmentMergedConfig]):
    """One merged expert for each segment. In the record all its tokens pick all experts, with the segment's weights.

    Parameters: `weight` (N, D).
    """

    def __init__(self, config: SegmentMergedConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        batch, length = sequences(x_TD.shape[0], context)
        mask_BL = real_tokens(x_TD, context)
        member_BLS = self._segments(mask_BL)
        x_BLD = x_TD.to(self.precision(x_TD)).view(batch, length, x_TD.shape[-1])
        x_BLD = x_BLD.masked_fill(~mask_BL.unsqueeze(-1), 0)
        member = member_BLS.to(x_BLD.dtype)
        with torch.autocast(x_TD.device.type, enabled=False):
            mean_BSD = torch.bmm(member.transpose(1, 2), x_BLD)
        mean_BSD = mean_BSD / member.sum(1).clamp(min=1).unsqueeze(-1)
        before_BSD = torch.cat([mean_BSD[:, :1].detach(), mean_BSD[:, :-1]], dim=1)
        logits_BSN = linear(before_BSD, self.weight)
        if self.config.first_segment == "equal":
            logits_BSN = torch.cat([torch.zeros_like(logits_BSN[:, :1]), logits_BSN[:, 1:]], dim=1)
        scores_BSN = logits_BSN.softmax(-1)
        weight_BSN = torch.cat([scores_BSN[:, :1].detach(), scores_BSN[:, 1:]], dim=1)
        return merged_routing(logits_BSN, scores_BSN, weight_BSN, member_BLS)

    def _segments(self, mask_BL: Tensor) -> Tensor:
        """Which tokens belong to each segment, (B, L, S)."""
        length = self.config.segment_length
        segment_BL = (mask_BL.long().cumsum(1) - 1).clamp(min=0) // length
        count = max(1, -(-mask_BL.shape[1] // length))
        segment_S = torch.arange(count, device=mask_BL.device)
        return (segment_BL.unsqueeze(-1) == segment_S) & mask_BL.unsqueeze(-1)

    @property
    def picks(self) -> float:
        return 1.0
