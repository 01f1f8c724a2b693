"""Transformers' progress bars, off while ours is on the screen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers.utils import logging


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Switch off transformers' bars for loading and writing weights, and back to what it was."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
