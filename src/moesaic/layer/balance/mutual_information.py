"""Mutual information between experts and what they are chosen for: all experts in use, each for something definite."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer.balance.base import BalanceLoss
from moesaic.layer.balance.labels import Label, label_of_tokens
from moesaic.layer.balance.sums import Scope, entropy, mean_over, probabilities, sum_over
from moesaic.layer.record import Routing, RoutingContext


class MutualInformation(BalanceLoss):
    """-I(E; X) = H(E given X) - H(E), with p(e) the mean over tokens of the normalised scores.

    The first entropy makes each choice definite, the second keeps all experts in use. X is the token (ModuleFormer,
    arXiv 2306.04640), or the token's task (Mod-Squad, arXiv 2212.08066) or modality: then
    p(e given x) is the mean over the tokens with that label, whose share of the tokens is p(x). Both have a coefficient
    of 0.001. At least -log N, where each token has one expert for sure and all experts have equal shares; 0 where the
    choice does not depend on X.

    Attributes:
        given: X.
        num_labels: how many tasks or modalities there are, numbered from 0.
        scope: tokens over which p is taken; only "sequence" is independent of accumulation and world size. A sequence has
            one task, so tasks need "batch".
    """

    type: Literal["mutual_information"] = "mutual_information"
    given: Literal["token", "task", "modality"] = "token"
    num_labels: PositiveInt | None = None
    scope: Scope = "sequence"

    @model_validator(mode="after")
    def _consistent(self) -> MutualInformation:
        if (self.given == "token") != (self.num_labels is None):
            problem = "does not go with given: token" if self.given == "token" else f"is needed for given: {self.given}"
            raise ConfigError("num_labels", self.num_labels, problem, "set it for task and modality only")
        if self.given == "task" and self.scope == "sequence":
            raise ConfigError("scope", "sequence", "holds one task only", "set scope: batch")
        return self

    @property
    def needs(self) -> frozenset[Label]:
        return frozenset() if self.given == "token" else frozenset({self.given})

    def per_sequence(self, routing: Routing, context: RoutingContext) -> Tensor:
        p_TM = probabilities(routing)
        mean_BM = mean_over(p_TM, context, self.scope)
        if self.given == "token" or self.num_labels is None:
            given_B = mean_over(entropy(p_TM).unsqueeze(-1), context, self.scope).squeeze(-1)
            return given_B - entropy(mean_BM)
        label_T = label_of_tokens(context, self.given, p_TM.shape[0], self.name)
        member_TG = F.one_hot(label_T, self.num_labels).to(p_TM.dtype)
        columns = p_TM.shape[-1]
        share_BG = mean_over(member_TG, context, self.scope)
        joint_TX = (member_TG.unsqueeze(-1) * p_TM.unsqueeze(-2)).flatten(1)
        joint_BGM = sum_over(joint_TX, context, self.scope).unflatten(-1, (self.num_labels, columns))
        tokens_BG1 = sum_over(member_TG, context, self.scope).clamp(min=1).unsqueeze(-1)
        return (share_BG * entropy(joint_BGM / tokens_BG1)).sum(-1) - entropy(mean_BM)
