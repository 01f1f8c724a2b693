"""Whose override a forward pass follows when several threads override one model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from moesaic.errors import UnsupportedOverride

T = TypeVar("T")
# In the place of what torch leaves out for a hook `with_kwargs` that another thread removes while it is about to be called:
# that it wants keywords is forgotten first. Such a hook is of an override that has ended, or not of the thread that calls it.
GONE: Any = object()


@dataclass(frozen=True, eq=False)
class Entered(Generic[T]):
    """An override that is in force.

    Attributes:
        override: itself.
        own_thread: whether no other thread may follow it.
        thread: who entered it.
        around: of another thread, which it acts inside of: what the thread would follow without it.
    """

    override: T
    own_thread: bool = False
    thread: int = field(default_factory=threading.get_ident)
    around: tuple[Entered[T], ...] = ()


def entered_now(override: T, entered: Sequence[Entered[T]], *, own_thread: bool = False) -> Entered[T]:
    """An override of the present thread, after others.

    One for this thread alone is a decoder's, which acts inside of whatever the thread's forward passes follow.

    Raises:
        UnsupportedOverride: see `for_this_thread`.
    """
    here = threading.get_ident()
    inside = own_thread and all(each.thread != here for each in entered)
    return Entered(override, own_thread, here, tuple(_followed(entered)) if inside else ())


def for_this_thread(entered: Sequence[Entered[T]]) -> list[T]:
    """Of the overrides in force, those for a forward pass of the present thread.

    A thread with overrides of its own follows only these, so that threads do not interfere. One without follows those of
    the other, as `Thread(target=model.generate)` inside a block should, unless they are for that thread alone.

    Raises:
        UnsupportedOverride: if it has none, and several others have.
    """
    return [each.override for each in _followed(entered)]


def _followed(entered: Sequence[Entered[T]]) -> list[Entered[T]]:
    here = threading.get_ident()
    own = [each for each in entered if each.thread == here]
    if own:
        around = own[0].around
        return [each for each in entered if each.thread == here or any(each is other for other in around)]
    others = [each for each in entered if not each.own_thread]
    if len({each.thread for each in others}) > 1:
        raise UnsupportedOverride(
            "several threads override the routing of this model, and the one that now runs it does not: it can't tell whose "
            "override it is to follow; enter the override in the thread that runs the model (an empty one for none)"
        )
    return others
