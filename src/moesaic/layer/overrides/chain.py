"""The parts of an override, applied to a layer's routing in the order of their phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer.asked import OWN, Asked, same_for_all
from moesaic.layer.override import RoutingOverride
from moesaic.layer.overrides.base import OverridePart, Phase, Picking, TokenKeys
from moesaic.layer.overrides.top_k import TopK
from moesaic.layer.overrides.without import WithoutExperts, replace_excluded
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers.base import Router


@dataclass(frozen=True)
class Parts:
    """An `OverrideFactory` of some parts.

    Parts that leave experts out act first, then the one that chooses, then those that drop picks, then those that weigh;
    parts of one kind act in the order in which they stand.
    """

    parts: Sequence[OverridePart]
    _asked: dict[tuple[int, ...], Asked] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, context: RoutingContext, num_tokens: int) -> RoutingOverride:
        return _Pass(sorted(self.parts, key=lambda part: part.phase), _Keys(context, num_tokens), self._asked)


class _Keys:
    """The keys of a pass, made once on the device of its routers."""

    def __init__(self, context: RoutingContext, num_tokens: int) -> None:
        self._context, self.num_tokens = context, num_tokens
        self._keys: TokenKeys | None = None

    def on(self, device: torch.device) -> TokenKeys:
        if self._keys is None or self._keys.position_T.device != device:
            self._keys = TokenKeys.of(self._context, self.num_tokens, device)
        return self._keys


@dataclass(frozen=True)
class _Pass:
    parts: Sequence[OverridePart]
    keys: _Keys
    lasting: dict[tuple[int, ...], Asked]
    """What was asked before of every token alike, kept by the factory for all of its passes."""

    def __call__(self, layer: int, router: Router, routing: Routing, context: RoutingContext) -> Routing:
        parts = [part for part in self.parts if part.covers(layer)]
        if not parts:
            return routing
        keys = self.keys.on(routing.index_TK.device)
        picking = before = Picking.of(layer, router, routing, context, keys)
        chooses = any(part.phase is Phase.CHOOSE for part in parts)
        for position, part in enumerate(parts):
            picking = part.apply(picking)
            last = position + 1 == len(parts) or parts[position + 1].phase is not Phase.ADMIT
            if part.phase is Phase.ADMIT and last and not chooses:
                excluded_M = torch.zeros(routing.num_columns, dtype=torch.bool, device=picking.order_TM.device)
                for leaves_out in parts[: position + 1]:
                    excluded_M[list(cast(WithoutExperts, leaves_out).without)] = True
                picking = replace_excluded(picking, excluded_M)
        return routing if picking is before else picking.done()

    def asked(self, layer: int, num_experts: int, top_k: int) -> Asked | None:
        """See `SaysPicks`."""
        places = [place for place, part in enumerate(self.parts) if part.covers(layer)]
        if not places:
            return OWN
        if len(places) > 1:
            return None
        tokens = self.keys.num_tokens
        found = self.lasting.get(key := (*places, num_experts, top_k, tokens))
        if found is not None:
            return found
        part = self.parts[places[0]]
        picks = part.picks(layer, num_experts, self.keys.on)
        if picks is None or isinstance(picks, Tensor):
            return None if picks is None else Asked(picks.contiguous(), lasting=False)
        own = isinstance(part, TopK) and part.k == top_k
        found = self.lasting[key] = OWN if own else same_for_all(picks, tokens)
        return found


def check_parts(parts: Sequence[OverridePart], routers: Mapping[int, Router]) -> None:
    """Check parts against each other and against the routers that they are for, before anything runs.

    Args:
        parts: of one override.
        routers: by decoder layer index.

    Raises:
        ConfigError: if a layer has no router, two parts choose the experts of one layer, or a field does not fit.
        UnsupportedOverride: if a router can't honour a part.
    """
    chooser: dict[int, str] = {}
    for part in parts:
        missing = [layer for layer in part.layers or () if layer not in routers]
        if missing:
            raise ConfigError(
                f"{part.name}.layers", missing[0], "is a layer without a router", f"routers are in {sorted(routers)}"
            )
        for layer, router in routers.items():
            if not part.covers(layer):
                continue
            part.check(layer, router)
            if part.phase is not Phase.CHOOSE:
                continue
            if layer in chooser:
                raise ConfigError(
                    part.name,
                    part.to_dict()["type"],
                    f"chooses the experts of layer {layer}, and so does {chooser[layer]}",
                    "let one part choose in a layer; `layers` restricts parts",
                )
            chooser[layer] = part.name
