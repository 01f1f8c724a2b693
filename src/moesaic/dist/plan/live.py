"""Counting the memory of tensors that are alive, fake or real, while a program runs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While entered, counts the bytes of every storage that an operation makes, until nothing refers to it.

    Storages that were there before are not counted, nor what operations allocate inside themselves. Works under
    `FakeTensorMode`, where a storage has a size and no memory.

    Attributes:
        live: bytes alive.
        peak: most bytes that were alive at once since the last `begin`.
        section: under what new storages are counted.
        by_section: bytes alive by the section that made them.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.section = ""
        self.by_section: Counter[str] = Counter()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def begin(self, section: str) -> None:
        """Count what comes under `section`, with a new peak."""
        self.section, self.peak = section, self.live

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._known:
            return
        self._known.add(address)
        size, section = storage.nbytes(), self.section
        self.live += size
        self.by_section[section] += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, address, size, section).atexit = False

    def _free(self, address: int, size: int, section: str) -> None:
        self._known.discard(address)
        self.live -= size
        self.by_section[section] -= size
