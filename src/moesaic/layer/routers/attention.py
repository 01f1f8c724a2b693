"""The attention router: logits of experts attend to each other before the best are taken."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.parts.best_k import BestKConfig, BestKRouter
from moesaic.layer.routers.parts.inputs import linear


class AttentionConfig(BestKConfig):
    """Fields of the attention router (Yuan 2.0-M32, arXiv 2405.17976): those of selection and weights.

    Three linear maps give each token a query, a key and a value number for every expert. Expert i attends to expert j
    with softmax_j(q_i k_j), and its logit is the mean of the values so weighted. There is no scaling of q k.
    """

    type: Literal["attention"] = "attention"

    def build(self, hidden_size: int, num_experts: int) -> AttentionRouter:
        self.check(num_experts)
        return AttentionRouter(self, hidden_size, num_experts)


class AttentionRouter(BestKRouter[AttentionConfig]):
    """The parameter is `weight` (3 N, D): rows of queries, then keys, then values, as in the released model."""

    def __init__(self, config: AttentionConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.weight = nn.Parameter(torch.empty(3 * num_experts, hidden_size))
        self.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        query_TN, key_TN, value_TN = linear(x_TD, self.weight).chunk(3, dim=-1)
        attention_TNN = (query_TN.unsqueeze(-1) * key_TN.unsqueeze(-2)).softmax(-1)
        return self.take_best((attention_TNN * value_TN.unsqueeze(-2)).sum(-1))
