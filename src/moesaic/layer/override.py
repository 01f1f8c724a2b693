"""Changing what layers' routers decide, from outside and for single forward passes: replays, other picks, other weights.

An override stands between a layer's router and everything that reads its routing: capacity, experts, record, losses. It
travels in the `RoutingContext` of a forward pass, so that layers which are recomputed meet the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from moesaic.layer.asked import OWN, Asked, asked_of
from moesaic.layer.record import Routing, RoutingContext

if TYPE_CHECKING:
    from moesaic.layer.routers.base import Router


class RoutingOverride(Protocol):
    """The override of one forward pass."""

    def __call__(self, layer: int, router: Router, routing: Routing, context: RoutingContext) -> Routing:
        """The routing to use in place of `routing`.

        It must be a pure function: under checkpointing it is called twice for a layer. `routing_at` makes a routing
        with other selections. Where it says which picks are dropped (`dropped_TK`, their experts still in `index_TK`),
        the layer drops these and its capacity no others; where it does not, the capacity drops what it would of any
        routing.

        Args:
            layer: index of the decoder layer.
            router: the layer's router.
            routing: what the router decided.
            context: of the forward pass.
        """
        ...


FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

OverrideFactory = Callable[[RoutingContext, int], RoutingOverride | None]
"""Makes the override of a forward pass, before any layer runs, from its context and the number of its tokens T; None leaves
the pass the model's own routing."""


@dataclass(frozen=True, eq=False)
class Overrides:
    """Several overrides: each gets what the one before it returned."""

    parts: Sequence[RoutingOverride]

    def __call__(self, layer: int, router: Router, routing: Routing, context: RoutingContext) -> Routing:
        for part in self.parts:
            routing = part(layer, router, routing, context)
        return routing

    def asked(self, layer: int, num_experts: int, top_k: int) -> Asked | None:
        """See `SaysPicks`."""
        found = [asked_of(part, layer, num_experts, top_k) for part in self.parts]
        changing = [asked for asked in found if asked is None or asked.pick_TK is not None]
        if not changing:
            return OWN
        return changing[0] if len(changing) == 1 else None


def _uncompiled(function: FunctionT) -> FunctionT:
    """`function`, for which compiled models leave their graph. torch declares no types for it."""
    return cast(FunctionT, torch.compiler.disable(function))


@_uncompiled  # it looks tokens up on the host
def override_of(
    factories: Sequence[OverrideFactory], context: RoutingContext, num_tokens: int
) -> RoutingOverride | None:
    """The override of a forward pass, from those who make one; None if none of them changes anything."""
    made = [factory(context, num_tokens) for factory in factories]
    parts = [part for part in made if part is not None]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else Overrides(parts)


@_uncompiled
def overridden(layer: int, router: Router, routing: Routing, context: RoutingContext) -> Routing:
    """What the override of `context` makes of a routing; compiled models leave their graph for it."""
    return routing if context.override is None else context.override(layer, router, routing, context)


def served(index_TK: Tensor, num_experts: int) -> Tensor:
    """Picks for experts that can't skip: where a token has no expert, its first one again, or expert 0 if it has none.

    An expert of its own costs no further weights to be read. The picks must have weight 0.
    """
    none_TK = index_TK >= num_experts
    first_T1 = index_TK.gather(-1, (~none_TK).to(torch.int8).argmax(-1, keepdim=True))
    return torch.where(none_TK, first_T1.masked_fill(first_T1 >= num_experts, 0), index_TK)


def routing_at(
    router: Router,
    routing: Routing,
    choice_TK: Tensor,
    *,
    weight_TK: Tensor | None = None,
    dropped_TK: Tensor | None = None,
) -> Routing:
    """The routing in which tokens have these selections.

    Logits, scores, state and the losses of the mechanism stay those of the router.

    Args:
        router: the router.
        routing: what it decided for these tokens.
        choice_TK: selections, int64: an expert in [0, N), a null expert in [N, M), or M for nothing. K is free.
        weight_TK: weights of the selections; None for those that the router's rule gives them, differentiable in its
            parameters.
        dropped_TK: selections that are dropped; see `RoutingOverride`.

    Raises:
        UnsupportedOverride: if no weights are given and the router can't say them.
    """
    none_TK, nothing_TK = choice_TK >= routing.num_experts, choice_TK >= routing.num_columns
    if weight_TK is None:
        weight_TK = router.weights_at(routing, choice_TK)
    identity_T = routing.identity_weight_T
    if identity_T is not None:
        identity_T = weight_TK.masked_fill(~none_TK | nothing_TK, 0.0).sum(-1)
    return replace(
        routing,
        index_TK=choice_TK.clamp(max=routing.num_experts),
        weight_TK=weight_TK.masked_fill(none_TK, 0.0),
        chosen_TK=choice_TK,
        dropped_TK=dropped_TK,
        identity_weight_T=identity_T,
        overridden=True,
    )
