"""Whose override a forward pass follows when several threads override one model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TypeVar

from moesaic.errors import UnsupportedOverride

T = TypeVar("T")


def for_this_thread(entered: Sequence[tuple[int, T]]) -> list[T]:
    """Of overrides and the threads that entered them, those for a forward pass of the present thread.

    A thread with overrides of its own follows only these, so that threads do not interfere. One without follows those of
    the other, as `Thread(target=model.generate)` inside a block should.

    Raises:
        UnsupportedOverride: if it has none, and several others have.
    """
    here = threading.get_ident()
    own = [override for thread, override in entered if thread == here]
    if own or not entered:
        return own
    if len({thread for thread, _ in entered}) > 1:
        raise UnsupportedOverride(
            "several threads override the routing of this model, and the one that now runs it does not: it can't tell whose "
            "override it is to follow; enter the override in the thread that runs the model (an empty one for none)"
        )
    return [override for _, override in entered]
