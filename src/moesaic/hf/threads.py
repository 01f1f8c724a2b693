"""Whose override a forward pass follows when several threads override one model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from moesaic.errors import UnsupportedOverride

T = TypeVar("T")


@dataclass(frozen=True)
class Entered(Generic[T]):
    """An override that is in force.

    Attributes:
        override: itself.
        own_thread: whether no other thread may follow it.
        thread: who entered it.
    """

    override: T
    own_thread: bool = False
    thread: int = field(default_factory=threading.get_ident)


def for_this_thread(entered: Sequence[Entered[T]]) -> list[T]:
    """Of the overrides in force, those for a forward pass of the present thread.

    A thread with overrides of its own follows only these, so that threads do not interfere. One without follows those of
    the other, as `Thread(target=model.generate)` inside a block should, unless they are for that thread alone.

    Raises:
        UnsupportedOverride: if it has none, and several others have.
    """
    here = threading.get_ident()
    own = [each.override for each in entered if each.thread == here]
    others = [each for each in entered if not each.own_thread]
    if own or not others:
        return own
    if len({each.thread for each in others}) > 1:
        raise UnsupportedOverride(
            "several threads override the routing of this model, and the one that now runs it does not: it can't tell whose "
            "override it is to follow; enter the override in the thread that runs the model (an empty one for none)"
        )
    return [each.override for each in others]
