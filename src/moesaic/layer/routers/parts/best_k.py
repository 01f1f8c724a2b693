"""What routers share that score all experts in a way of their own and then take the K best of each token."""

from __future__ import annotations

from typing import Literal, TypeVar

from pydantic import PositiveInt, model_validator
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer.record import Routing
from moesaic.layer.routers.base import BaseRouterConfig, Router, check_top_k
from moesaic.layer.routers.scores import at, normalize, score, softmax_over, top_k


class BestKConfig(BaseRouterConfig):
    """Fields of selection and weights; how logits come about is each router's own.

    Attributes:
        top_k: experts for each token (K).
        score_function: how logits become scores.
        softmax_over: "all" experts before selection, or the "selected" logits after it.
        normalize_top_k: divide the K weights by their sum. For softmax scores this and "selected" are the same thing, and
            need two picks: one renormalised weight is 1 whatever the router says.
        scaling_factor: multiplies the weights last.
        stable_ties: equal scores go to the lower index; otherwise the device decides.
    """

    top_k: PositiveInt
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    softmax_over: Literal["all", "selected"] = "all"
    normalize_top_k: bool = False
    scaling_factor: float = 1.0
    stable_ties: bool = True

    @model_validator(mode="after")
    def _learns(self) -> BestKConfig:
        if self.softmax_over == "selected" and self.score_function != "softmax":
            raise ConfigError(
                "softmax_over", "selected", f"needs softmax scores, not {self.score_function}", "leave it at `all`"
            )
        if self.top_k == 1 and (self.normalize_top_k or self.softmax_over == "selected"):
            field = "normalize_top_k" if self.normalize_top_k else "softmax_over"
            raise ConfigError(
                field,
                getattr(self, field),
                "gives the only pick of top_k = 1 weight 1, so that the language-model loss can't teach the router",
                "leave it out, or choose top_k 2 or more",
            )
        return self

    def check(self, num_experts: int) -> None:
        check_top_k(self.top_k, num_experts)


BestKConfigT = TypeVar("BestKConfigT", bound=BestKConfig)


class BestKRouter(Router[BestKConfigT]):
    """A router that turns its logits into a record by the fields of `BestKConfig`."""

    def __init__(self, config: BestKConfigT, num_experts: int) -> None:
        super().__init__(config, num_experts, config.top_k)

    def take_best(self, logits_TN: Tensor, compared_TN: Tensor | None = None, state: Tensor | None = None) -> Routing:
        """The record of tokens with these logits.

        Args:
            logits_TN: logits.
            compared_TN: what the selection compares; the scores by default.
            state: what the next layer's router reads.
        """
        config = self.config
        scores_TN = score(logits_TN, config.score_function)
        selection_TN = (scores_TN if compared_TN is None else compared_TN).detach()
        index_TK = top_k(selection_TN, config.top_k, stable=config.stable_ties)
        return Routing(
            index_TK=index_TK,
            weight_TK=self._weights(logits_TN, scores_TN, index_TK),
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=selection_TN,
            state=state,
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        # The scores of the record may be others, which balance losses are to see.
        scores_TN = score(routing.logits_TN, self.config.score_function)
        return self._weights(routing.logits_TN, scores_TN, index_TK, kept_TK)

    def _weights(self, logits_TN: Tensor, scores_TN: Tensor, index_TK: Tensor, kept_TK: Tensor | None = None) -> Tensor:
        config = self.config
        if config.softmax_over == "selected":
            weight_TK = softmax_over(logits_TN.gather(-1, index_TK), kept_TK)
        else:
            weight_TK = at(scores_TN, index_TK, kept_TK)
        if config.normalize_top_k:
            weight_TK = normalize(weight_TK)
        if config.scaling_factor != 1.0:
            weight_TK = weight_TK * config.scaling_factor
        return weight_TK
