"""Stable routing: learn where tokens go, distil it into a table of token ids, and freeze that."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from moesaic.layer.load import LayerLoad
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Need, Router, fill_buffer
from moesaic.layer.routers.parts.inputs import ids_of, linear
from moesaic.layer.routers.scores import at, top_k


class StableConfig(BaseRouterConfig):
    """Fields of StableMoE's two training stages (arXiv 2204.08396, section 3). K is 1.

    Attributes:
        vocabulary_size: number of token ids.
        width: of the embedding that the light router has of its own.
        freeze_at: share of the training after which the routing stands, above 0.
    """

    type: Literal["stable"] = "stable"
    vocabulary_size: PositiveInt
    width: PositiveInt = 50
    freeze_at: float = Field(default=0.1, gt=0, le=1)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"token_ids"})

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"distillation"})

    @property
    def unranked(self) -> str | None:
        return "in its second stage a table of token ids names the experts, and ranks no others"

    def check(self, num_experts: int) -> None:
        """Any number of experts will do."""

    def build(self, hidden_size: int, num_experts: int) -> StableRouter:
        return StableRouter(self, hidden_size, num_experts)


class StableRouter(Router[StableConfig]):
    """y = sigmoid(h e_a) f_a(h); a = argmax of h e_i in stage 1, and of the token's embedding with c_i in stage 2.

    In stage 1 the light router learns by cross entropy to name the expert that the hidden state picks; that loss is
    `Routing.auxiliary["distillation"]`. At the step that ends stage 1 its answer for every id goes into a table, which
    is what frozen means: no optimiser can move it. e_i go on learning, through the weight.

    In stage 2 the record's logits and scores carry no gradient, so that balance losses no longer act; the distillation
    loss is 0.

    Tensors: `weight` (N, D) holds e_i; `token_embedding` (V, width) and `token_weight` (N, width) are the light router;
    the buffer `expert_of_token` (V,), int64, is the table, -1 in stage 1.
    """

    expert_of_token: Tensor
    looked_up = ("token_embedding",)

    def __init__(self, config: StableConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, top_k=1)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.token_embedding = nn.Parameter(torch.empty(config.vocabulary_size, config.width))
        self.token_weight = nn.Parameter(torch.empty(num_experts, config.width))
        self.register_buffer("expert_of_token", torch.empty(config.vocabulary_size, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        for parameter in (self.weight, self.token_embedding, self.token_weight):
            nn.init.normal_(parameter, std=std)
        fill_buffer(self.expert_of_token, torch.full_like(self.expert_of_token, -1))

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        ids_T = ids_of(context, "token_ids", self.config.vocabulary_size, field="vocabulary_size")
        logits_TN = linear(x_TD, self.weight)
        table_T1 = self.expert_of_token[ids_T].unsqueeze(-1)
        frozen_T1 = table_T1 >= 0
        learned_T1 = top_k(logits_TN.detach(), 1, stable=True)
        index_T1 = torch.where(frozen_T1, table_T1, learned_T1)
        picked_TN = torch.zeros_like(logits_TN).scatter(-1, index_T1, 1.0)
        scores_TN = logits_TN.sigmoid()
        light_TN = linear(F.embedding(ids_T, self.token_embedding), self.token_weight)
        loss_T = F.cross_entropy(light_TN.to(logits_TN.dtype), learned_T1.squeeze(-1), reduction="none")
        return Routing(
            index_TK=index_T1,
            weight_TK=scores_TN.gather(-1, index_T1),
            logits_TN=torch.where(frozen_T1, logits_TN.detach(), logits_TN),
            scores_TN=torch.where(frozen_T1, scores_TN.detach(), scores_TN),
            selection_TN=torch.where(frozen_T1, picked_TN, logits_TN.detach()),
            basis_TN=scores_TN,
            auxiliary={"distillation": loss_T.masked_fill(frozen_T1.squeeze(-1), 0.0)},
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        assert routing.basis_TN is not None
        return at(routing.basis_TN, index_TK, kept_TK)

    @torch.no_grad()
    def post_step(self, load: LayerLoad, progress: float) -> None:
        """Freeze the routing when stage 1 is over."""
        if progress >= self.config.freeze_at and not self.frozen:
            light_VN = linear(self.token_embedding, self.token_weight)
            self.expert_of_token.copy_(top_k(light_VN, 1, stable=True).squeeze(-1))

    @property
    def frozen(self) -> bool:
        """Whether stage 2 has begun."""
        return bool(self.expert_of_token[0] >= 0)
