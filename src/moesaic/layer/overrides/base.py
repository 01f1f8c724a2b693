"""What parts of a routing override share: a config each, and the picks that they hand on to each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, ClassVar, cast

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from moesaic.configuration import Config
from moesaic.errors import ConfigError, UnsupportedOverride
from moesaic.layer.override import routing_at
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import Router
from moesaic.layer.routers.scores import top_k


class Phase(IntEnum):
    """When a part acts, whatever its place in the list; parts of one phase act in the order of the list."""

    ADMIT = 0
    CHOOSE = 1
    DROP = 2
    WEIGH = 3


@dataclass(frozen=True)
class TokenKeys:
    """What tells tokens apart, in whatever batch they come: position in their sequence, and token id where it is known.

    Attributes:
        position_T: int64.
        token_T: int64; None for a model that was given embeddings.
    """

    position_T: Tensor
    token_T: Tensor | None

    @classmethod
    def of(cls, context: RoutingContext, num_tokens: int, device: torch.device) -> TokenKeys:
        """Those of a forward pass, from its context; positions count real tokens where none were given."""
        token_T = None if context.token_ids_T is None else context.token_ids_T.to(device, torch.int64)
        position_T = context.position_T
        if position_T is None:
            real_BL = torch.ones(context.batch_size, num_tokens // max(context.batch_size, 1), dtype=torch.int64)
            if context.mask_T is not None:
                real_BL = context.mask_T.view(real_BL.shape).to(torch.int64)
            position_T = (real_BL.cumsum(-1) - 1).clamp(min=0).reshape(-1)
        return cls(position_T.to(device, torch.int64), token_T)


KeysOn = Callable[[torch.device], TokenKeys]
"""Gives the keys of a forward pass on a device."""


@dataclass(frozen=True)
class Picking:
    """The picks of one layer on their way through the parts of an override.

    Attributes:
        layer: index of the decoder layer.
        router: its router.
        routing: what the router decided, or an override before this one.
        context: of the forward pass; its mask is False also for tokens that the override is not for.
        keys: what tells tokens apart.
        order_TM: what ranks go by, -inf where a token may not pick a column.
        excluded: whether experts were taken out of it.
        choice_TK: selections, in [0, M]; M for nothing.
        weight_TK: their weights, of null experts those with which they pass tokens on; None for those of the router's
            rule.
    """

    layer: int
    router: Router
    routing: Routing
    context: RoutingContext
    keys: TokenKeys
    order_TM: Tensor
    excluded: bool
    choice_TK: Tensor
    weight_TK: Tensor | None

    @classmethod
    def of(cls, layer: int, router: Router, routing: Routing, context: RoutingContext, keys: TokenKeys) -> Picking:
        """As the router, or an override before, left them."""
        order_TM = routing.selection_TN.detach().masked_fill(~router.admitted(routing), float("-inf"))
        weight_TK = routing.weight_TK
        if routing.identity_weight_T is not None:
            # The record holds only the sum of what its null experts pass on.
            weight_TK = router.weights_at(routing, routing.choice_TK)
            if routing.overridden:
                null_TK = routing.choice_TK >= routing.num_experts
                total_T = weight_TK.masked_fill(~null_TK, 0.0).sum(-1)
                ratio_T = routing.identity_weight_T / torch.where(total_T == 0, 1.0, total_T)
                weight_TK = torch.where(null_TK, weight_TK * ratio_T.unsqueeze(-1), routing.weight_TK)
        return cls(layer, router, routing, context, keys, order_TM, False, routing.choice_TK, weight_TK)

    def chosen(self, choice_TK: Tensor) -> Picking:
        """With other selections, weighed by the router's rule."""
        return replace(self, choice_TK=choice_TK, weight_TK=None)

    def weights(self) -> Tensor:
        """Weights of the selections, (T, K), in the router's precision."""
        weight_TK = self.weight_TK
        if weight_TK is None:
            weight_TK = self.router.weights_at(self.routing, self.choice_TK)
        if self.routing.identity_weight_T is None:
            weight_TK = weight_TK.masked_fill(self.choice_TK >= self.routing.num_experts, 0.0)
        return weight_TK

    def ranked(self, k: int) -> Tensor:
        """The k best columns of each token, best first; equal ones by their number."""
        return top_k(self.order_TM, k, stable=True)

    def require(self, needed: int, what: str, *, among_M: Tensor | None = None) -> None:
        """Check that every token may pick so many columns.

        Raises:
            UnsupportedOverride: naming layer and token.
        """
        if not self._may_lack:
            return
        admitted_TM = self.order_TM > float("-inf")
        if among_M is not None:
            admitted_TM = admitted_TM & among_M
        admitted_T = admitted_TM.sum(-1)
        lacks_T = admitted_T < needed
        if self.context.mask_T is not None:
            lacks_T = lacks_T & self.context.mask_T.to(lacks_T.device)
        if lacks_T.any():
            token = int(lacks_T.nonzero()[0])
            limit = "experts that are not left out" if self.excluded else "experts that its router admits for it"
            raise UnsupportedOverride(
                f"{what} in layer {self.layer} needs {needed} experts, and token {token} has only "
                f"{int(admitted_T[token])} {limit}; ask for less"
            )

    @property
    def _may_lack(self) -> bool:
        """Whether a token may have fewer columns to pick than there are; looking at values would stall a GPU."""
        return (
            self.excluded
            or self.routing.overridden
            or self.router.most_admitted < self.router.num_columns
            or "modality" in self.router.config.needs
        )

    def done(self) -> Routing:
        """The routing that they make."""
        found = routing_at(self.router, self.routing, self.choice_TK, weight_TK=self.weight_TK, dropped_TK=None)
        if self.choice_TK is self.routing.choice_TK or self.choice_TK is self.routing.index_TK:
            found = replace(found, dropped_TK=self.routing.dropped_TK)
        return replace(found, selection_TN=self.order_TM) if self.excluded else found


class OverridePart(Config, ABC):
    """One mechanism of an override.

    Attributes:
        layers: decoder layers that it acts in; None for all that have a router.
    """

    phase: ClassVar[Phase]
    ranks: ClassVar[bool] = False
    """Whether it needs to know how the router ranks a token's experts."""
    reweighs: ClassVar[bool] = True
    """Whether the router's rule must say weights of picks that are not the router's own."""

    layers: tuple[NonNegativeInt, ...] | None = None

    @property
    def name(self) -> str:
        """Its `type`, by which errors call it."""
        return cast(str, cast(Any, self).type)

    def covers(self, layer: int) -> bool:
        """Whether it acts in a layer."""
        return self.layers is None or layer in self.layers

    def check(self, layer: int, router: Router) -> None:
        """Check against the router of a layer, before anything runs.

        Raises:
            ConfigError: naming a field that does not fit it.
            UnsupportedOverride: if the router can't honour it.
        """
        kind = router.config.type
        if self.ranks and router.config.unranked is not None:
            raise UnsupportedOverride(
                f"{self.name} can't act in layer {layer}: {router.config.unranked} (router {kind}); "
                "name experts, or change weights only"
            )
        if self.reweighs and not router.says_weights:
            raise UnsupportedOverride(
                f"{self.name} can't act in layer {layer}: router {kind} can't say the weights of picks that are not its own; "
                "override another layer, or change weights only"
            )

    def picks(self, layer: int, num_experts: int, keys: KeysOn) -> Sequence[int] | Tensor | None:
        """The picks that it leaves a token with, if these can be said before the router has run, as `Asked` says them.

        Args:
            layer: index of the decoder layer.
            num_experts: N; each token may pick any of them.
            keys: what tells tokens apart.

        Returns:
            (K,) for all tokens, int64 (T, K), or None if only `apply` can tell.
        """
        return None

    @abstractmethod
    def apply(self, picking: Picking) -> Picking:
        """What it makes of the picks; a pure function, since layers may be recomputed."""


def check_at_most(field: str, value: int, most: int, layer: int, what: str) -> None:
    """Refuse a rank or number of picks that the router of a layer can't give.

    Raises:
        ConfigError: naming both.
    """
    if value > most:
        raise ConfigError(field, value, f"is more than the {most} {what} in layer {layer}", f"choose 1 to {most}")


def check_experts(field: str, experts: tuple[int, ...], router: Router, layer: int) -> None:
    """Refuse numbers of experts that a layer does not have.

    Raises:
        ConfigError: naming the number.
    """
    beyond = [expert for expert in experts if expert >= router.num_experts]
    if beyond:
        raise ConfigError(
            field, beyond[0], f"is no expert of layer {layer}", f"choose from 0 to {router.num_experts - 1}"
        )


def check_distinct(field: str, values: tuple[int, ...]) -> None:
    """Refuse a list that names something twice.

    Raises:
        ConfigError: naming what.
    """
    twice = [value for position, value in enumerate(values) if value in values[:position]]
    if twice:
        raise ConfigError(field, list(values), f"names {twice[0]} twice", "name each once")
