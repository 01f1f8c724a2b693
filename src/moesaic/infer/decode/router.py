"""Top-k routing of a few tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.infer.decode import source
from moesaic.infer.decode.swap import PLAN, Fast
from moesaic.layer import Routing, RoutingContext, TopKConfig, TopKRouter
from moesaic.layer.kernels.native import decode

# Stock routers, softmax over all experts, and whether they cast the weights to the dtype of the model.
_STOCK = {source.SOFTMAX_ROUTER: True, source.NORMALIZED_ROUTER: True, source.NORMALIZED_FLOAT_ROUTER: False}


class FastTopKRouter(Fast):
    """Our `TopKRouter` in one native call when there are few tokens and no graph; its record is complete."""

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        own: Any = self
        weight_ND = own._parameters["weight"]
        if (
            torch.compiler.is_compiling()
            or (own.training and own.config.input_jitter)
            or not 0 < x_TD.shape[0] <= decode.ROWS_MOST
            or x_TD.stride(1) != 1
            or not decode.suits(x_TD, weight_ND)
        ):
            return self._plain.forward(own, x_TD, context)
        plan = own.__dict__[PLAN]
        if plan is None or plan.address != weight_ND.data_ptr():
            plan = own.__dict__[PLAN] = decode.RouterPlan(weight_ND, own.bias, rule_of(own))
        return record_of(plan(x_TD))


class FastSoftmaxRouter(Fast):
    """A stock router, softmax over all experts, in one native call when there are few tokens and no graph."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own: Any = self
        weight_ND = own._parameters["weight"]
        x_TD = hidden_states.reshape(-1, own.hidden_dim)
        if (
            torch.compiler.is_compiling()
            or not 0 < x_TD.shape[0] <= decode.ROWS_MOST
            or x_TD.stride(1) != 1
            or not decode.suits(x_TD, weight_ND)
        ):
            return self._plain.forward(own, hidden_states)
        plan = own.__dict__[PLAN]
        if plan is None or plan.address != weight_ND.data_ptr():
            plan = own.__dict__[PLAN] = decode.RouterPlan(weight_ND, None, rule_of(own))
        logits_TN, _, index_TK, weight_TK = plan(x_TD)
        return logits_TN.to(x_TD.dtype), weight_TK.to(x_TD.dtype) if plan.rule.round_weights else weight_TK, index_TK


def mixin_for(module: nn.Module) -> type[Fast] | None:
    """What computes a router natively, or None."""
    if not decode.readable(module._parameters.get("weight")):
        return None
    if type(module) is TopKRouter:
        return FastTopKRouter if _knows(module.config) else None
    return FastSoftmaxRouter if source.says(type(module).forward, *_STOCK) else None


def _knows(config: TopKConfig) -> bool:
    return (
        config.score_function in ("softmax", "sigmoid")
        and config.normalization_order == 1
        and not config.normalization_floor
        and not (config.expert_scale or config.selection_bias or config.input_norm or config.input_scale)
        and config.logit_scale == 1
        and config.logit_softcap is None
        and config.num_groups is None
        and config.select_by == "scores"
        and config.stable_ties
    )


def rule_of(router: Any) -> decode.RouterRule:
    """What a router of a known kind does with its logits."""
    if not isinstance(router, TopKRouter):
        casts = next(casts for body, casts in _STOCK.items() if source.says(router._plain.forward, body))
        normalize = getattr(router, "norm_topk_prob", True)
        return decode.RouterRule(router.top_k, normalize=normalize, round_logits=True, round_weights=casts)
    config = router.config
    return decode.RouterRule(
        config.top_k,
        sigmoid=config.score_function == "sigmoid",
        over_selected=config.softmax_over == "selected",
        normalize=config.normalize_top_k,
        epsilon=config.normalization_epsilon,
        scale=config.scaling_factor,
    )


def record_of(picks: decode.Picks, *, overridden: bool = False) -> Routing:
    """The record of our router, or what an override made of it."""
    index_TK, weight_TK, logits_TN, scores_TN = picks.index_TK, picks.weight_TK, picks.logits_TN, picks.scores_TN
    chosen_TK = index_TK if overridden else None
    return Routing(index_TK, weight_TK, logits_TN, scores_TN, scores_TN, chosen_TK=chosen_TK, overridden=overridden)
