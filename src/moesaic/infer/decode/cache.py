"""Room in a key-value cache for tokens to come.

transformers' `DynamicCache` copies all keys and values for each new token. Here they lie in a buffer that is larger
than what it holds and grows by half; the cache sees the part in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from moesaic.layer.kernels.native import decode

_ROOM = "_native_room"
_LEAST = 64


@dataclass(frozen=True)
class _Room:
    """Buffers (B, heads, room, width) of one cache layer; `owner` tells its layer from a shallow copy of that."""

    place: decode.Place
    owner: int

    def is_that_of(self, layer: DynamicLayer, keys: Tensor, values: Tensor) -> bool:
        """Whether a layer holds the front of these buffers, with room behind."""
        return (
            self.owner == id(layer)
            and keys.shape[2] < self.place.keys.shape[2]
            and keys.data_ptr() == self.place.keys.data_ptr()
            and values.data_ptr() == self.place.values.data_ptr()
            and keys.stride() == self.place.keys.stride()
        )


def layer_of(cache: object, index: int) -> DynamicLayer | None:
    """The layer of a cache that holds tokens and is of the plain growing kind, or None."""
    if not isinstance(cache, Cache) or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    if type(layer) is not DynamicLayer or not layer.is_initialized or cast(Tensor, layer.keys).dim() != 4:
        return None
    return layer


def held_by(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer that `layer_of` gave."""
    return cast(Tensor, layer.keys), cast(Tensor, layer.values)


def place_in(layer: DynamicLayer) -> decode.Place:
    """Buffers with what a layer holds in front and room for another token behind."""
    keys, values = held_by(layer)
    room: _Room | None = vars(layer).get(_ROOM)
    if room is not None and room.is_that_of(layer, keys, values):
        return room.place
    batch, heads, length, width = keys.shape
    size = max(_LEAST, length + length // 2 + 1)
    grown = []
    for part in (keys, values):
        buffer = part.new_empty(batch, heads, size, width)
        buffer[:, :, :length] = part
        grown.append(buffer)
    place = decode.Place(*grown)
    vars(layer)[_ROOM] = _Room(place, id(layer))
    return place


def take_one(layer: DynamicLayer, place: decode.Place, length: int) -> None:
    """Let the layer hold `length` tokens of the buffers."""
    layer.keys, layer.values = place.keys.narrow(2, 0, length), place.values.narrow(2, 0, length)
