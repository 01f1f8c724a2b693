"""Capacity: each expert takes a bounded number of tokens, and picks that find it full become no expert."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from moesaic.configuration import Config
from moesaic.errors import ConfigError
from moesaic.layer import noise
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import Dependence

# Tells the numbers drawn here from those that the layer's router draws.
_STREAM = 0xCA9AC


class CapacityConfig(Config):
    """How many tokens an expert takes, and which ones when more want it.

    With S real tokens, K picks each and N experts, C slots an expert follow from a factor cf, where 1 is room for
    exactly balanced picks. K is the width of the record: where tokens pick fewer experts (null experts, thresholds), a
    factor below 1 may be enough. Products are exact: 10 tokens, one expert and a factor of 1.1 make 11 slots, where floating
    point gives 12. Sources: GShard (arXiv 2006.16668, algorithm 1), Switch Transformer (2101.03961, eq. 3), DeepSpeed
    (2109.10465), V-MoE (2106.05974, section 4); docs/capacity.md has each as a preset of these fields.

    Attributes:
        factor: cf in training; None limits nothing there.
        eval_factor: cf in evaluation; None, the default, drops nothing there.
        minimum: slots that an expert has at least (4 in DeepSpeed and Mesh TensorFlow).
        rounding: C = "ceil" of cf K S / N (GShard, DeepSpeed, Megatron), its "floor" (OpenMoE's PyTorch code) or the
            "nearest" integer, halves to even (T5X); or "tutel": K floor(cf ceil(S / N)).
        multiple_of: C is rounded up to a multiple of this, last.
        scope: S and the slots are those of each "sequence" on its own, or of the whole micro-"batch" as in DeepSpeed
            and GShard, where tokens of one sequence push out those of another. As there, the micro-batch is that of one
            process: with it results depend on the number of processes.
        policy: who gets the slots. "position": the first tokens. "probability": the picks with the highest score
            (DeepSpeed). "weight": those with the highest weight, which differs where weights are normalised over a
            token's picks (Megatron). "batch_priority": the tokens whose best picked expert has the highest score (V-MoE). "random": anyone
            (DeepSpeed's random token selection), so that late tokens are not dropped more often.
        choice_order: "token_first" fills a token's picks together; "rank_first" places all first choices before any
            second one (GShard, DeepSpeed's top-2). A token's first choice is the picked expert with the highest score.
            With the policies "probability" and "weight" this decides between equal ones only.
        renormalize: after a drop, scale the weights that are left so that the token keeps the sum of its weights
            (DeepSpeed for K > 1). Otherwise they stay as they were (Megatron).
    """

    factor: float | None = Field(gt=0, le=1000)
    eval_factor: float | None = Field(default=None, gt=0, le=1000)
    minimum: NonNegativeInt = 4
    rounding: Literal["ceil", "floor", "nearest", "tutel"] = "ceil"
    multiple_of: PositiveInt = 1
    scope: Literal["sequence", "batch"] = "sequence"
    policy: Literal["position", "probability", "weight", "batch_priority", "random"] = "position"
    choice_order: Literal["token_first", "rank_first"] = "token_first"
    renormalize: bool = False

    @model_validator(mode="after")
    def _limits_something(self) -> CapacityConfig:
        if self.factor is None and self.eval_factor is None:
            raise ConfigError("factor", None, "limits nothing, nor does eval_factor", "set one or remove the capacity")
        return self

    def limits(self, training: bool) -> bool:
        """Whether it drops anything in this mode."""
        return self._factor(training) is not None

    def depends_on(self, training: bool) -> frozenset[Dependence]:
        """What decides which picks of a token are kept, besides the token itself and earlier ones of its sequence.

        Not counted is the number of a sequence's tokens, which sets the number of slots.
        """
        if not self.limits(training):
            return frozenset()
        found: set[Dependence] = set()
        if self.scope == "batch":
            found.add("other_sequences")
        # A later token's first choice comes before an earlier token's second one.
        if self.policy != "position" or self.choice_order == "rank_first":
            found.add("later_tokens")
        if self.policy == "random" and training:
            found.add("random_numbers")
        return frozenset(found)

    def slots(self, tokens: Tensor, num_experts: int, top_k: int, training: bool) -> Tensor:
        """C for each number of real tokens S, int64.

        Args:
            tokens: S, int64 of any shape.
            num_experts: N.
            top_k: K.
            training: which factor counts; it must limit something.
        """
        factor = self._factor(training)
        assert factor is not None
        if self.rounding == "tutel":
            capacity = top_k * (-(-tokens // num_experts) * factor.numerator // factor.denominator)
        else:
            above, below = tokens * (top_k * factor.numerator), num_experts * factor.denominator
            capacity = above // below
            twice_rest = 2 * (above % below)
            if self.rounding == "ceil":
                capacity = capacity + (twice_rest > 0)
            elif self.rounding == "nearest":
                capacity = capacity + ((twice_rest > below) | ((twice_rest == below) & (capacity % 2 == 1)))
        capacity = capacity.clamp(min=self.minimum)
        return -(-capacity // self.multiple_of) * self.multiple_of

    def most(self, batch: int, length: int, num_experts: int, top_k: int, training: bool) -> int | None:
        """The most tokens that an expert takes of a batch, whatever is padding in it; None if nothing limits.

        Args:
            batch: number of sequences.
            length: tokens of each, padding included.
            num_experts: N.
            top_k: K.
            training: which factor counts.
        """
        if not self.limits(training):
            return None
        groups, tokens = (batch, length) if self.scope == "sequence" else (1, batch * length)
        return groups * int(self.slots(torch.tensor(tokens), num_experts, top_k, training))

    def _factor(self, training: bool) -> Fraction | None:
        """The factor as the short decimal that was written; integers then give C without rounding errors."""
        factor = self.factor if training else self.eval_factor
        return None if factor is None else Fraction(factor).limit_denominator(10**6)


def limit_capacity(
    routing: Routing, config: CapacityConfig, context: RoutingContext | None, *, training: bool, layer: int
) -> Routing:
    """The routing in which each expert serves at most C picks.

    Dropped picks become no expert with weight 0; `chosen_TK` keeps what was chosen and `dropped_TK` marks them. An
    expert with n picks keeps min(C, n) of them under every policy. Picks of null experts need no slot. Padding takes
    none and gets no expert; it is not marked as dropped.

    Args:
        routing: what a router gave.
        config: how many and which.
        context: sequences and padding; None stands for one sequence without padding.
        training: training or evaluation, where random numbers are the same in each pass and for each sequence.
        layer: index of the decoder layer, for random numbers.
    """
    if not config.limits(training):
        return routing
    batch = 1 if context is None else context.batch_size
    length = routing.index_TK.shape[0] // batch
    real_BL = torch.ones(batch, length, dtype=torch.bool, device=routing.index_TK.device)
    if context is not None and context.mask_T is not None:
        real_BL = context.mask_T.view(batch, length)
    place_TK = _places(routing, config, real_BL, context, training, layer)
    groups = batch if config.scope == "sequence" else 1
    tokens_G = real_BL.view(groups, -1).sum(-1) if length else real_BL.new_zeros(groups, dtype=torch.int64)
    slots_G = config.slots(tokens_G, routing.num_experts, routing.top_k, training)
    slots_T1 = slots_G.repeat_interleave(real_BL.numel() // groups).unsqueeze(-1)
    dropped_TK = place_TK >= slots_T1
    return drop_picks(routing, dropped_TK, unused_TK=~real_BL.reshape(-1, 1), renormalize=config.renormalize)


def drop_picks(
    routing: Routing, dropped_TK: Tensor, *, unused_TK: Tensor | None = None, renormalize: bool = False
) -> Routing:
    """The routing in which these picks have become no expert.

    Args:
        routing: with the picks.
        dropped_TK: those that find their expert full.
        unused_TK: those that are no expert either, without being marked as dropped.
        renormalize: as in `CapacityConfig`.
    """
    nothing_TK = dropped_TK if unused_TK is None else dropped_TK | unused_TK
    weight_TK = routing.weight_TK.masked_fill(nothing_TK, 0.0)
    if renormalize:
        weight_TK = _renormalize(routing, weight_TK, dropped_TK)
    return replace(
        routing,
        index_TK=routing.index_TK.masked_fill(nothing_TK, routing.num_experts),
        weight_TK=weight_TK,
        chosen_TK=routing.choice_TK,
        dropped_TK=dropped_TK,
    )


def _places(
    routing: Routing,
    config: CapacityConfig,
    real_BL: Tensor,
    context: RoutingContext | None,
    training: bool,
    layer: int,
) -> Tensor:
    """Place of each pick in the queue for its expert, from 0; -1 for picks that need no slot. Shape (T, K)."""
    tokens, top_k, experts = routing.index_TK.shape[0], routing.top_k, routing.num_experts
    needs_TK = (routing.index_TK < experts) & real_BL.reshape(-1, 1)
    score_TK = routing.scores_TN.detach().gather(-1, routing.index_TK.clamp(max=experts - 1))
    # The order of picks in a record carries no meaning: put them in the order of choice, equal scores by expert.
    choice_TK = routing.index_TK.argsort(dim=-1, stable=True)
    score_TK = score_TK.masked_fill(~needs_TK, float("-inf"))
    choice_TK = choice_TK.gather(-1, score_TK.gather(-1, choice_TK).argsort(dim=-1, descending=True, stable=True))
    score_TK, expert_TK = score_TK.gather(-1, choice_TK), routing.index_TK.gather(-1, choice_TK)

    # Sort by several keys, the last one first, as stable sorts do.
    queue_S = torch.arange(tokens * top_k, device=expert_TK.device)
    rank_TK = torch.arange(top_k, device=expert_TK.device).expand(tokens, top_k)
    by_rank = [rank_TK] if config.choice_order == "rank_first" else []
    match config.policy:
        case "position":
            keys = by_rank
        case "probability":
            keys = [*by_rank, -score_TK]
        case "weight":
            keys = [*by_rank, -routing.weight_TK.detach().gather(-1, choice_TK)]
        case "batch_priority":
            keys = [-score_TK[:, :1].expand(-1, top_k), *by_rank]
        case "random":
            keys = [_random(config, real_BL, context, training, layer, score_TK), *by_rank]
    groups = real_BL.shape[0] if config.scope == "sequence" else 1
    group_T = torch.arange(tokens, device=expert_TK.device) // max(tokens // groups, 1)
    bucket_TK = group_T.unsqueeze(-1) * experts + expert_TK
    needs_TK = needs_TK.gather(-1, choice_TK)
    bucket_TK = bucket_TK.masked_fill(~needs_TK, groups * experts)
    for key_TK in [*keys, bucket_TK]:
        queue_S = queue_S[key_TK.reshape(-1)[queue_S].argsort(stable=True)]

    bucket_S = bucket_TK.reshape(-1)
    counts = torch.zeros(groups * experts + 1, dtype=torch.int64, device=bucket_S.device)
    counts = counts.scatter_add(0, bucket_S, torch.ones_like(bucket_S))
    starts = counts.cumsum(0) - counts
    place_S = torch.empty_like(queue_S)
    place_S[queue_S] = torch.arange(queue_S.numel(), device=queue_S.device) - starts[bucket_S[queue_S]]
    place_TK = place_S.view(tokens, top_k).masked_fill(~needs_TK, -1)
    return torch.empty_like(place_TK).scatter(-1, choice_TK, place_TK)


def _random(
    config: CapacityConfig,
    real_BL: Tensor,
    context: RoutingContext | None,
    training: bool,
    layer: int,
    like: Tensor,
) -> Tensor:
    """A number for each pick, drawn by the token's place among the real tokens, so that padding shifts nothing."""
    batch, length = real_BL.shape
    top_k = like.shape[-1]
    # In evaluation, which has no seed, a sequence must not depend on its row in the batch.
    drawn = batch if training or config.scope == "batch" else 1
    unit_LBK = noise.uniform(
        context if training else None, layer, (length, drawn, top_k), stream=_STREAM, like=like
    ).expand(length, batch, top_k)
    place_LB1 = (real_BL.cumsum(-1) - 1).clamp(min=0).t().unsqueeze(-1)
    return unit_LBK.gather(0, place_LB1.expand(length, batch, top_k)).transpose(0, 1).reshape(-1, top_k)


def _renormalize(routing: Routing, weight_TK: Tensor, dropped_TK: Tensor) -> Tensor:
    """Weights after drops that again sum to what the token's experts had; no weight changes where nothing dropped."""
    none_TK = routing.index_TK >= routing.num_experts
    before_T1 = routing.weight_TK.masked_fill(none_TK, 0.0).sum(-1, keepdim=True)
    after_T1 = weight_TK.masked_fill(none_TK, 0.0).sum(-1, keepdim=True)
    scaled_T1 = dropped_TK.any(-1, keepdim=True) & (after_T1 > 0)
    # Both branches of `where` get a gradient, and that of a division by 0 would be NaN.
    ratio_T1 = before_T1 / after_T1.masked_fill(~scaled_T1, 1.0)
    return torch.where(scaled_T1 & ~none_TK, weight_TK * ratio_T1, weight_TK)
