"""Room in a key-value cache for tokens to come.

transformers' `DynamicCache` copies all keys and values for each new token. Here they lie in a buffer that is larger
than what it holds and grows by half; the cache sees the part in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_ROOM = "_native_room"
_LEAST = 64


@dataclass(frozen=True)
class _Room:
    """Buffers (B, heads, room, width) of one cache layer; `owner` tells its layer from a shallow copy of that."""

    keys: Tensor
    values: Tensor
    owner: int


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


def room_for_one(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer as buffers with room for another token, behind the ones it holds."""
    keys, values = held_by(layer)
    length = keys.shape[2]
    room = vars(layer).get(_ROOM)
    if (
        room is not None
        and room.owner == id(layer)
        and length < room.keys.shape[2]
        and keys.data_ptr() == room.keys.data_ptr()
        and values.data_ptr() == room.values.data_ptr()
        and keys.stride() == room.keys.stride()
    ):
        return room.keys, room.values
    batch, heads, _, width = keys.shape
    size = max(_LEAST, length + length // 2 + 1)
    grown = []
    for part in (keys, values):
        buffer = part.new_empty(batch, heads, size, width)
        buffer[:, :, :length] = part
        grown.append(buffer)
    vars(layer)[_ROOM] = room = _Room(grown[0], grown[1], id(layer))
    return room.keys, room.values


def take_one(layer: DynamicLayer, keys: Tensor, values: Tensor, length: int) -> None:
    """Let the layer hold `length` tokens of the buffers."""
    layer.keys, layer.values = keys.narrow(2, 0, length), values.narrow(2, 0, length)
