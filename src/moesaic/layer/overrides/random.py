"""Random experts, the same again for the same token in whatever batch."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from moesaic.layer.noise import hash_of
from moesaic.layer.overrides.base import KeysOn, OverridePart, Phase, Picking, TokenKeys, check_at_most
from moesaic.layer.routers.base import Router


class RandomExperts(OverridePart):
    """Experts at random, all different, anew for each token and layer: random-1 routing of SCMoE (arXiv 2405.14507).

    Who is drawn is a pure function of seed, layer, position in the sequence, and token id where the model is given ids. So a
    row has the same experts alone, in any batch, with padding, with a cache or without; give rows overrides of their own
    with other seeds to draw anew for the same text. Experts that the router does not admit for a token (outside its groups
    or modality) and null experts are not drawn. Weights follow the router's rule at the drawn picks.

    Attributes:
        random: experts for each token.
        seed: of the draw.
    """

    phase: ClassVar = Phase.CHOOSE

    type: Literal["random"] = "random"
    random: PositiveInt = 1
    seed: int = Field(default=0, ge=0, lt=2**63)

    def check(self, layer: int, router: Router) -> None:
        super().check(layer, router)
        check_at_most(
            "random", self.random, min(router.num_experts, router.most_admitted), layer, "experts that a token may have"
        )

    def picks(self, layer: int, num_experts: int, keys: KeysOn) -> Tensor:
        drawn_TN = self._drawn(layer, num_experts, keys(torch.device("cpu")))
        return -1 - drawn_TN.sort(dim=-1, descending=True, stable=True).indices[:, : self.random]

    def apply(self, picking: Picking) -> Picking:
        num_experts = picking.routing.num_experts
        expert_M = torch.arange(picking.order_TM.shape[-1], device=picking.order_TM.device)
        picking.require(self.random, f"random = {self.random}", among_M=expert_M < num_experts)
        drawn_TN = self._drawn(picking.layer, num_experts, picking.keys)
        least = torch.iinfo(torch.int64).min
        drawn_TN = drawn_TN.masked_fill(picking.order_TM[:, :num_experts] == float("-inf"), least)
        return picking.chosen(drawn_TN.sort(dim=-1, descending=True, stable=True).indices[:, : self.random])

    def _drawn(self, layer: int, num_experts: int, keys: TokenKeys) -> Tensor:
        """Of each token's experts the first are those with the largest numbers."""
        position_T1 = keys.position_T.unsqueeze(-1)
        token_T1 = torch.zeros_like(position_T1) if keys.token_T is None else keys.token_T.unsqueeze(-1) + 1
        where = position_T1.device
        seed, at = (torch.tensor(value, device=where) for value in (self.seed, layer))
        return hash_of(seed, at, position_T1, token_T1, torch.arange(num_experts, device=where))
