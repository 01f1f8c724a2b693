"""Picks that an override can say before routers have run, which native code then takes instead of the K best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Asked:
    """The picks that tokens are to have in one layer, weighed by the router's own rule.

    Attributes:
        pick_TK: int64, contiguous, on CPU: r > 0 for the token's expert of rank r, -1 - e for expert e, 0 for nothing. None
            if all tokens keep what their router picks, in a record that no override has touched.
        lasting: whether other forward passes of as many tokens are asked the same.
    """

    pick_TK: Tensor | None
    lasting: bool = True


OWN = Asked(None)
"""What changes nothing."""


class SaysPicks(Protocol):
    """A `RoutingOverride` that may know what it asks for before it is called."""

    def asked(self, layer: int, num_experts: int, top_k: int) -> Asked | None:
        """What a call would make of the routing of a layer, or None if only a call can tell.

        Only of routers that let every token pick any of N experts, none of them null, and rank by their scores.

        Args:
            layer: index of the decoder layer.
            num_experts: N of its router.
            top_k: K of its router.
        """
        ...


def asked_of(override: object, layer: int, num_experts: int, top_k: int) -> Asked | None:
    """What an override asks for in a layer, or None if it can't say; see `SaysPicks`."""
    say = getattr(override, "asked", None)
    return None if say is None else say(layer, num_experts, top_k)


def same_for_all(picks: Sequence[int], num_tokens: int) -> Asked:
    """The same picks for every token."""
    return Asked(torch.tensor(picks).expand(num_tokens, -1).contiguous())


def merged(parts: Sequence[tuple[Asked, Tensor]], own_T: Tensor | None, top_k: int) -> Asked:
    """Picks that tokens are asked for by several, in one record as wide as the widest of them.

    Args:
        parts: at least one: what each asks for, of all tokens, and which are its own: bool (T,).
        own_T: tokens that nobody asks, bool (T,); None if there are none.
        top_k: K of the router, which tokens have that keep their own picks.
    """
    rows = [(each.pick_TK, has_T) for each, has_T in parts]
    if own_T is not None:
        rows.append((None, own_T))
    if all(pick_TK is None for pick_TK, _ in rows):
        return OWN
    wide = max(top_k if pick_TK is None else pick_TK.shape[1] for pick_TK, _ in rows)
    found_TK = torch.zeros(len(rows[0][1]), wide, dtype=torch.int64)
    for pick_TK, has_T in rows:
        if pick_TK is None:
            found_TK[has_T, :top_k] = torch.arange(1, top_k + 1)
        else:
            found_TK[has_T, : pick_TK.shape[1]] = pick_TK[has_T]
    return Asked(found_TK, all(each.lasting for each, _ in parts))
