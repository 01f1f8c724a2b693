"""Expert choice: experts take tokens instead of tokens experts, so that all experts have the same load."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.layer.load import LayerLoad
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import BaseRouterConfig, Dependence, Router, fill_buffer
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.routers.parts.plans import capped_plan
from moesaic.layer.routers.parts.sequences import Scope, best_first, real_tokens, take
from moesaic.layer.routers.scores import ScoreFunction, at, score


class ExpertChoiceConfig(BaseRouterConfig):
    """Fields of expert-choice routing.

    The defaults are those of Zhou et al. (arXiv 2202.09368, section 3.2): S = softmax(X W) over experts, each expert
    takes the C = T c / N tokens with its largest scores, with c = 2, and the weight of a token is its score.

    Attributes:
        capacity_factor: c, the experts that a token has on average.
        evaluation_capacity_factor: c in evaluation; None for the same.
        minimum_capacity: an expert takes at least so many tokens, if there are.
        rounding: how T c / N becomes a whole number.
        scope: tokens among which experts choose: those of each "sequence" or of the whole "batch".
        score_function: how logits become scores.
        max_experts_per_token: limit on the experts of a token, by a plan under that limit whose largest shares each
            expert takes (section 3.3). Experts still take exactly C tokens, so that a plan that is not all zeros and
            ones may exceed the limit at a few tokens. None for no limit.
        plan_entropy: weight of the entropy in that plan (lambda).
        plan_iterations: rounds of Dykstra's algorithm for it.
        decoding: "refuse" chooses in evaluation as in training, which no decoder can do. With "threshold", a token goes
            in evaluation to the experts that score it above a threshold of theirs: the running mean of the lowest
            score that an expert's C largest had in training. At most `max_experts_per_token` with the largest scores.
        threshold_decay: weight of the past in that mean; the first steps count alike.
    """

    type: Literal["expert_choice"] = "expert_choice"
    capacity_factor: float = Field(default=2.0, gt=0)
    evaluation_capacity_factor: float | None = Field(default=None, gt=0)
    minimum_capacity: NonNegativeInt = 1
    rounding: Literal["ceil", "floor", "nearest"] = "ceil"
    scope: Scope = "sequence"
    score_function: ScoreFunction = "softmax"
    max_experts_per_token: PositiveInt | None = None
    plan_entropy: float = Field(default=1e-3, gt=0)
    plan_iterations: PositiveInt = 100
    decoding: Literal["refuse", "threshold"] = "refuse"
    threshold_decay: float = Field(default=0.99, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> ExpertChoiceConfig:
        factor = self.evaluation_capacity_factor
        if factor is not None and self.decoding == "threshold":
            raise ConfigError(
                "evaluation_capacity_factor",
                factor,
                "has no effect with decoding: threshold, where experts have no capacity in evaluation",
                "remove it",
            )
        for name in ("capacity_factor", "evaluation_capacity_factor"):
            factor, cap = getattr(self, name), self.max_experts_per_token
            if factor is not None and cap is not None and factor > cap:
                raise ConfigError(
                    name,
                    factor,
                    f"needs more experts per token than max_experts_per_token ({cap}) allows",
                    f"choose at most {cap}",
                )
        return self

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        if self.decoding == "threshold" and not training:
            return frozenset()
        return frozenset({"later_tokens"} if self.scope == "sequence" else {"later_tokens", "other_sequences"})

    @property
    def unservable(self) -> str | None:
        reason = super().unservable
        return None if reason is None else f"{reason}; models trained with decoding: threshold can decode"

    @property
    def may_skip(self) -> bool:
        return True

    @property
    def variable_width(self) -> bool:
        return True

    def check(self, num_experts: int) -> None:
        for name in ("capacity_factor", "evaluation_capacity_factor", "max_experts_per_token"):
            value = getattr(self, name)
            if value is not None and value > num_experts:
                raise ConfigError(
                    name, value, f"is larger than num_experts ({num_experts})", f"choose at most {num_experts}"
                )

    def build(self, hidden_size: int, num_experts: int) -> ExpertChoiceRouter:
        self.check(num_experts)
        return ExpertChoiceRouter(self, hidden_size, num_experts)

    def capacity(self, tokens_G: Tensor, num_experts: int, *, training: bool) -> Tensor:
        """C, the tokens that each expert takes of so many, int64."""
        factor = self.capacity_factor
        if not training and self.evaluation_capacity_factor is not None:
            factor = self.evaluation_capacity_factor
        # In float64: products that are whole numbers must not come out a little above.
        exact_G = tokens_G.to(torch.float64) * factor / num_experts
        match self.rounding:
            case "ceil":
                rounded_G = exact_G.sub(1e-9).ceil()
            case "floor":
                rounded_G = exact_G.add(1e-9).floor()
            case "nearest":
                rounded_G = exact_G.add(0.5).floor()
        return torch.minimum(rounded_G.long().clamp(min=self.minimum_capacity), tokens_G)


class ExpertChoiceRouter(Router[ExpertChoiceConfig]):
    """Linear logits, scores, and for each expert the tokens with its largest scores; ties go to the earlier token.

    The record is ragged: K is the largest number of experts that a token has, and the other picks are no expert.
    Parameters: `weight` (N, D). With `decoding: threshold` also the buffers `score_threshold` (N,), which stays float32 when
    the module is cast and starts at the score of equal logits, and `num_updates`.
    """

    score_threshold: Tensor | None
    num_updates: Tensor | None

    def __init__(self, config: ExpertChoiceConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, num_experts, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        threshold = config.decoding == "threshold"
        self.full_precision = ("score_threshold",) if threshold else ()
        self.register_buffer("score_threshold", torch.empty(num_experts, dtype=torch.float32) if threshold else None)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64) if threshold else None)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, std=std)
        if self.score_threshold is not None and self.num_updates is not None:
            equal_N = torch.zeros(self.num_experts, dtype=torch.float32)
            fill_buffer(self.score_threshold, score(equal_N, self.config.score_function))
            fill_buffer(self.num_updates, torch.zeros((), dtype=torch.int64))

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        config, logits_TN = self.config, linear(x_TD, self.weight)
        scores_TN = score(logits_TN, config.score_function)
        mask_GL = real_tokens(x_TD, context, config.scope)
        selection_TN = scores_TN.detach()
        statistics: dict[str, Tensor] = {}
        if self.score_threshold is not None and not self.training:
            picked_TN = self._above_threshold(selection_TN, self.score_threshold)
            picked_TN = picked_TN & mask_GL.view(-1, 1)
        else:
            scores_GLN = selection_TN.view(*mask_GL.shape, self.num_experts)
            tokens_G = mask_GL.sum(1)
            capacity_G = config.capacity(tokens_G, self.num_experts, training=self.training)
            if config.decoding == "threshold":
                statistics = lowest_taken(scores_GLN, mask_GL, capacity_G)
            if config.max_experts_per_token is not None:
                scores_GLN = capped_plan(
                    scores_GLN,
                    mask_GL,
                    capacity_G,
                    config.max_experts_per_token,
                    entropy=config.plan_entropy,
                    iterations=config.plan_iterations,
                )
                selection_TN = scores_GLN.reshape(selection_TN.shape)
            picked_TN = take(scores_GLN, mask_GL, capacity_G).view_as(selection_TN)
        index_TK = ragged(picked_TN)
        return Routing(
            index_TK=index_TK,
            weight_TK=F.pad(scores_TN, (0, 1)).gather(-1, index_TK),
            logits_TN=logits_TN,
            scores_TN=scores_TN,
            selection_TN=selection_TN,
            ragged=True,
            statistics=statistics,
        )

    def _weigh(self, routing: Routing, index_TK: Tensor, kept_TK: Tensor) -> Tensor:
        return at(routing.scores_TN, index_TK, kept_TK)

    def _above_threshold(self, scores_TN: Tensor, threshold_N: Tensor) -> Tensor:
        picked_TN = scores_TN > threshold_N
        cap = self.config.max_experts_per_token
        if cap is None:
            return picked_TN
        best_TK = scores_TN.masked_fill(~picked_TN, -1).sort(dim=-1, descending=True, stable=True).indices[:, :cap]
        return picked_TN & torch.zeros_like(picked_TN).scatter(-1, best_TK, True)

    def post_step(self, load: LayerLoad, progress: float) -> None:
        """Move the thresholds towards the step's mean over sequences (over batches with that scope)."""
        if self.score_threshold is None or self.num_updates is None:
            return
        lowest_N, groups = load.statistics["lowest_taken"], load.statistics["groups"]
        with torch.no_grad():
            self.num_updates += 1
            rate = (1 / self.num_updates.to(torch.float64)).clamp(min=1 - self.config.threshold_decay)
            # A step without a single token leaves them where they are.
            change_N = torch.where(groups > 0, lowest_N / groups.clamp(min=1) - self.score_threshold, 0.0)
            self.score_threshold += (rate * change_N).to(self.score_threshold.dtype)

    @property
    def picks(self) -> float:
        return min(self.config.capacity_factor, float(self.num_experts))

    def extra_repr(self) -> str:
        config = self.config
        return f"num_experts={self.num_experts}, capacity_factor={config.capacity_factor}, scope={config.scope}"


def lowest_taken(scores_GLN: Tensor, mask_GL: Tensor, capacity_G: Tensor) -> dict[str, Tensor]:
    """The lowest of each expert's C largest scores, summed over groups that have tokens (N,), and their number."""
    if not scores_GLN.shape[1]:
        return {"lowest_taken": scores_GLN.new_zeros(scores_GLN.shape[-1]), "groups": scores_GLN.new_zeros(())}
    order_GLN = best_first(scores_GLN, mask_GL.unsqueeze(-1))
    last_G1N = (capacity_G - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, scores_GLN.shape[-1])
    lowest_GN = scores_GLN.gather(1, order_GLN.gather(1, last_G1N)).squeeze(1)
    filled_G = (capacity_G > 0).to(scores_GLN.dtype)
    return {"lowest_taken": (lowest_GN * filled_G.unsqueeze(-1)).sum(0), "groups": filled_G.sum()}


def ragged(picked_TN: Tensor) -> Tensor:
    """The picks as `index_TK`, experts in ascending order and N after them; at least one column."""
    num_experts = picked_TN.shape[-1]
    width = int(picked_TN.sum(-1).max()) if picked_TN.shape[0] else 0
    expert_N = torch.arange(num_experts, device=picked_TN.device)
    return torch.where(picked_TN, expert_N, num_experts).sort(-1).values[:, : max(width, 1)].contiguous()
