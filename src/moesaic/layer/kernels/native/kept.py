"""Memory of large gradients, kept from one training step to the next.

A gradient that is set to None goes back to the operating system, which clears the same memory again for the next one. Where
the machine is virtual it may even have gone back to the host meanwhile: half a gigabyte then takes half a second, as long
as all products of the backward pass. So memory that nobody uses any more waits here for the next gradient of its size, of
whichever weight, and is let go with the weight that used it last. It is never more than all gradients that were alive at
once.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, UntypedStorage

from moesaic.layer.kernels.native.call import fresh

# Smaller memory is kept by glibc's malloc, whose largest M_MMAP_THRESHOLD this is.
KEPT_FROM = 32 * 2**20


@dataclass
class _Block:
    storage: UntypedStorage
    user: weakref.ref[Tensor]

    @property
    def free(self) -> bool:
        # One is ours. Memory shared with other processes has users that are not counted.
        return torch._C._storage_Use_Count(self.storage._cdata) == 1 and not self.storage.is_shared()


_blocks: list[_Block] = []
_lock = threading.RLock()  # a weight may be collected while a block is looked for


def kept_or_fresh(shape: tuple[int, ...], weight: Tensor) -> Tensor:
    """An empty tensor for a gradient of `weight`, of its dtype."""
    size = torch.Size(shape).numel() * weight.element_size()
    if size < KEPT_FROM:
        return fresh(shape, weight.dtype)
    owner = weight if weight._base is None else weight._base
    with _lock:
        block = next((block for block in _blocks if block.storage.nbytes() == size and block.free), None)
        if block is not None:
            block.user = weakref.ref(owner, _let_go)
            return torch.empty(0, dtype=weight.dtype).set_(block.storage).view(shape)
        made = fresh(shape, weight.dtype)
        _blocks.append(_Block(made.untyped_storage(), weakref.ref(owner, _let_go)))
        return made


def _let_go(user: weakref.ref[Tensor]) -> None:
    with _lock:
        _blocks[:] = [block for block in _blocks if block.user is not user]
