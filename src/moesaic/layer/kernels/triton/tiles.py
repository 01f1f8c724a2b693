"""How large the tiles of the grouped GEMMs are.

The table is written for H100 and H200 (SM90) and cut down for cards with less shared memory. It is not measured yet:
docs/benchmarks/index.md says by which command it will be. What is checked without a card is that every row compiles for
SM80, SM86, SM89 and SM90, fits their shared memory and spills few registers (tests/layer/kernels/test_triton_compile.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton

Product = Literal["up", "two_up", "down", "hidden_gradient", "weight_gradient"]

# Shared memory that one program may use, in bytes, by compute capability (CUDA C++ programming guide, table of technical
# specifications per compute capability).
SHARED_MEMORY = {(8, 0): 166912, (8, 6): 101376, (8, 7): 166912, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448}
SMALLEST_SHARED_MEMORY = 101376


@dataclass(frozen=True)
class Tile:
    """A tile of a product and how it is computed.

    Attributes:
        rows: rows of the result (of the left factor; of the packed gradient, its first axis).
        outs: columns of the result; of each of the two results for "two_up".
        inner: length of one step of the sum.
        num_warps: warps of a program.
        num_stages: steps whose loads are in flight.
    """

    rows: int
    outs: int
    inner: int
    num_warps: int
    num_stages: int

    def stage_bytes(self, product: Product, element_size: int) -> int:
        """Shared memory of one stage."""
        outs = 2 * self.outs if product == "two_up" else self.outs
        return (self.rows + outs) * self.inner * element_size


# For 16-bit numbers, by (product, rows of a block). A product with few rows is bound by reading weights: wide steps and
# many of them in flight. One with many rows is bound by the tensor cores: as large a tile as registers hold.
_TILES: dict[tuple[Product, int], Tile] = {
    ("up", 16): Tile(16, 128, 128, 4, 4),
    ("up", 32): Tile(32, 128, 64, 4, 4),
    ("up", 64): Tile(64, 128, 64, 4, 4),
    ("up", 128): Tile(128, 128, 64, 8, 4),
    ("two_up", 16): Tile(16, 64, 128, 4, 4),
    ("two_up", 32): Tile(32, 64, 64, 4, 4),
    ("two_up", 64): Tile(64, 64, 64, 4, 4),
    ("two_up", 128): Tile(128, 64, 64, 8, 4),
    ("down", 16): Tile(16, 128, 128, 4, 4),
    ("down", 32): Tile(32, 128, 64, 4, 4),
    ("down", 64): Tile(64, 128, 64, 4, 4),
    ("down", 128): Tile(128, 128, 64, 8, 4),
    ("hidden_gradient", 16): Tile(16, 64, 128, 4, 4),
    ("hidden_gradient", 32): Tile(32, 64, 64, 4, 4),
    ("hidden_gradient", 64): Tile(64, 64, 64, 4, 4),
    ("hidden_gradient", 128): Tile(128, 64, 64, 8, 4),
}
# The inner axis of weight gradients is the rows of one expert.
_WEIGHT_GRADIENT = {16: Tile(128, 128, 16, 8, 3), 32: Tile(128, 128, 32, 8, 4), 64: Tile(128, 128, 64, 8, 4)}
GROUP_ROWS = 8


def block_rows(rows_per_expert: float) -> int:
    """Rows of a block: the smallest of 16, 32, 64 and 128 that holds the average expert's rows."""
    return next((rows for rows in (16, 32, 64) if rows_per_expert <= rows), 128)


def choose(
    product: Product, rows_per_expert: float, outs: int, inner: int, dtype: torch.dtype, device: torch.device
) -> Tile:
    """The tile for a product.

    Args:
        product: which product.
        rows_per_expert: average over experts.
        outs: columns of the result.
        inner: length of the sum; for weight gradients the rows of the result.
        dtype: of the factors.
        device: where it runs.
    """
    if product == "weight_gradient":
        tile = _WEIGHT_GRADIENT[min(block_rows(rows_per_expert), 64)]
        tile = replace(tile, rows=min(tile.rows, _covering(inner)), outs=min(tile.outs, _covering(outs)))
    else:
        tile = _TILES[product, block_rows(rows_per_expert)]
        tile = replace(tile, outs=min(tile.outs, _covering(outs)), inner=min(tile.inner, _covering(inner)))
    return fitted(tile, product, dtype.itemsize, shared_memory(device))


def fitted(tile: Tile, product: Product, element_size: int, limit: int) -> Tile:
    """The tile with its step halved for 32-bit numbers and stages taken away until it fits the shared memory."""
    if element_size == 4:
        tile = replace(tile, inner=max(16, tile.inner // 2))
    stages = min(tile.num_stages, limit // tile.stage_bytes(product, element_size))
    return replace(tile, num_stages=max(1, stages))


def table(capability: tuple[int, int], dtype: torch.dtype) -> list[tuple[Product, Tile]]:
    """Every row of the table, as it is used on a card."""
    rows: dict[tuple[Product, int], Tile] = {**_TILES}
    rows.update({("weight_gradient", size): tile for size, tile in _WEIGHT_GRADIENT.items()})
    limit = SHARED_MEMORY.get(capability, SMALLEST_SHARED_MEMORY)
    return [(product, fitted(tile, product, dtype.itemsize, limit)) for (product, _), tile in rows.items()]


def _covering(size: int) -> int:
    """The smallest power of two that holds `size`, at least what the tensor cores need."""
    return max(16, triton.next_power_of_2(size))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Shared memory that one program may use on a device, in bytes."""
    if device.type != "cuda":
        return SMALLEST_SHARED_MEMORY
    return SHARED_MEMORY.get(torch.cuda.get_device_capability(device), SMALLEST_SHARED_MEMORY)
