"""What routers share that average experts' parameters for a group of tokens, instead of sending tokens to experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.layer.assignment import Merge
from moesaic.layer.record import Routing
from moesaic.layer.routers.base import BaseRouterConfig


class MergingConfig(BaseRouterConfig):
    """Facts that hold whenever experts are merged: a token runs one network, and no expert can be full."""

    @property
    def takes_picks(self) -> bool:
        return False

    @property
    def refuses_capacity(self) -> str | None:
        return "experts are merged, so that none can be full"


def merged_routing(
    logits_BSN: Tensor,
    scores_BSN: Tensor,
    weight_BSN: Tensor,
    member_BLS: Tensor,
    index_BSK: Tensor | None = None,
    added_TD: Tensor | None = None,
) -> Routing:
    """The record of tokens whose S groups in each of B sequences pass one merged expert each.

    Args:
        logits_BSN: router outputs of each group.
        scores_BSN: the score function of them.
        weight_BSN: weight of each expert in each group's merged expert.
        member_BLS: True where a token belongs to a group; padding belongs to none, and any other token to one.
        index_BSK: experts of each group; None for all.
        added_TD: what is added to the tokens before they pass the experts, or None.
    """
    batch, num_groups, num_experts = logits_BSN.shape
    length, device = member_BLS.shape[1], logits_BSN.device
    if index_BSK is None:
        index_BSK = torch.arange(num_experts, device=device).expand(batch, num_groups, num_experts)
    # A product instead of indexing, whose gradient would be a sum in an order that threads decide.
    member = member_BLS.to(logits_BSN.dtype)
    with torch.autocast(device.type, enabled=False):
        logits_TN, scores_TN = (torch.bmm(member, values).flatten(0, 1) for values in (logits_BSN, scores_BSN))
        weight_TK = torch.bmm(member, weight_BSN.gather(-1, index_BSK)).flatten(0, 1)
    group_BL = member_BLS.to(torch.int64).argmax(-1) if num_groups else member_BLS.new_zeros((batch, length)).long()
    offset_B1 = num_groups * torch.arange(batch, device=device).unsqueeze(-1)
    group_T = (group_BL + offset_B1).masked_fill(~member_BLS.any(-1), batch * num_groups).flatten()
    picks_BLK = index_BSK.gather(1, group_BL.unsqueeze(-1).expand(-1, -1, index_BSK.shape[-1]))
    return Routing(
        index_TK=picks_BLK.flatten(0, 1),
        weight_TK=weight_TK,
        logits_TN=logits_TN,
        scores_TN=scores_TN,
        selection_TN=scores_TN.detach(),
        assignment=Merge(weight_BSN.flatten(0, 1), group_T, added_TD),
    )
