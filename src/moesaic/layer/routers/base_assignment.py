"""BASE layers: in training, tokens are assigned to experts so that all get equally many and the total score is largest."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Dependence, Router
from moesaic.layer.routers.parts.balanced_assignment import balanced_assignment
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.parts.sequences import Scope, real_tokens
from moesaic.layer.routers.scores import at, top_k


class BaseAssignmentConfig(BaseRouterConfig):
    """Fields of routing by balanced assignment (BASE, Lewis et al., arXiv 2103.16716, section 3).

    Each token has one expert, and the weight of that is the sigmoid of its score. In training the assignment maximises
    the total score with the same number of tokens for each expert (eq. 2 and 3); in evaluation each token takes the
    expert with its largest score.

    Attributes:
        scope: tokens that are assigned together: those of the "batch", as in the paper, or of each "sequence".
        linear_bias: give the logits' linear map a learned bias.
    """

    type: Literal["base_assignment"] = "base_assignment"
    scope: Scope = "batch"
    linear_bias: bool = False

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        if not training:
            return frozenset()
        return frozenset({"later_tokens"} if self.scope == "sequence" else {"later_tokens", "other_sequences"})

    def check(self, num_experts: int) -> None:
        """Any number of experts will do."""

    def build(self, hidden_size: int, num_experts: int) -> BaseAssignmentRouter:
        self.check(num_experts)
        return BaseAssignmentRouter(self, hidden_size, num_experts)


class BaseAssignmentRouter(Router[BaseAssignmentConfig]):
    """Linear logits; the expert of a token by `balanced_assignment` in training and by the largest logit otherwise.

    Parameters are `weight` (N, D) and, with `linear_bias`, `bias` (N,).
    """

    def __init__(self, config: BaseAssignmentConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, 1)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.linear_bias else None
        self.reset_parameters()

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        logits_TN = linear(x_TD, self.weight, self.bias)
        selection_TN = logits_TN.detach()
        index_T1 = top_k(selection_TN, 1, stable=True)
        if self.training:
            mask_GL = real_tokens(x_TD, context, self.config.scope)
            assigned_GL = balanced_assignment(selection_TN.view(*mask_GL.shape, self.num_experts), mask_GL)
            index_T1 = torch.where(mask_GL.view(-1, 1), assigned_GL.view(-1, 1), index_T1)
        scores_TN = logits_TN.sigmoid()
        return Routing(
            index_TK=index_T1,
            weight_TK=scores_TN.gather(-1, index_T1),
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=selection_TN,
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        return at(routing.scores_TN, index_TK, kept_TK)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, scope={self.config.scope}"
