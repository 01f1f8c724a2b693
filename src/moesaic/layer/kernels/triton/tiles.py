"""How large the tiles of the grouped GEMMs are.

The table is written for H100 and H200 (SM90) and cut down for cards with less shared memory. It is not measured yet:
docs/benchmarks/index.md says by which command it will be. What is checked without a card is that every row compiles for
SM80, SM86, SM89 and SM90, fits their shared memory, uses tensor cores with loads in flight, and spills few registers
(tests/layer/kernels/test_triton_compile.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import triton

from moesaic.layer.kernels.triton.precision import dot_precision

Product = Literal["up", "two_up", "down", "hidden_gradient", "weight_gradient"]

# Shared memory that one program may use, in bytes, by compute capability (CUDA C++ programming guide, table of technical
# specifications per compute capability).
SHARED_MEMORY = {
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 7): 166912,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (12, 0): 101376,
}
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

    def shared_bytes(self, product: Product, element_size: int) -> int:
        """Shared memory that the factors take; an upper bound over architectures and versions of Triton."""
        outs = 2 * self.outs if product == "two_up" else self.outs
        # Rows of weight gradients are looked up first, which takes two of the stages and no shared memory to speak of.
        buffers = max(1, self.num_stages - 2) if product == "weight_gradient" else self.num_stages
        return buffers * (self.rows + outs) * self.inner * element_size


# For 16-bit numbers, by (product, rows per expert up to which it is meant). A product with few rows is bound by reading
# weights: long steps and many of them in flight. One with many rows is bound by the tensor cores and by what they are
# fed: as large a tile as registers hold. The rows of a weight gradient are its inner axis.
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
    ("weight_gradient", 16): Tile(128, 128, 16, 8, 5),
    ("weight_gradient", 32): Tile(128, 128, 32, 8, 5),
    ("weight_gradient", 64): Tile(128, 128, 64, 8, 5),
    ("weight_gradient", 128): Tile(128, 128, 64, 8, 5),
}
# SM90 multiplies from shared memory, of which it has more: with enough rows for it, a larger tile reads less.
_LARGE: dict[tuple[Product, int], Tile] = {
    ("up", 256): Tile(128, 256, 64, 8, 4),
    ("two_up", 256): Tile(128, 128, 64, 8, 4),
    ("down", 256): Tile(128, 256, 64, 8, 4),
    ("hidden_gradient", 256): Tile(128, 128, 64, 8, 4),
    ("weight_gradient", 256): Tile(128, 256, 64, 8, 6),
}
_LARGE_SHARED_MEMORY = 200_000
# float32 without TF32 has no tensor cores: each thread keeps its part of the tile in registers.
_EXACT: dict[Product, Tile] = {
    "up": Tile(64, 64, 16, 4, 3),
    "two_up": Tile(64, 32, 16, 4, 3),
    "down": Tile(64, 64, 16, 4, 3),
    "hidden_gradient": Tile(64, 64, 16, 4, 3),
    "weight_gradient": Tile(64, 64, 16, 4, 3),
}
GROUP_ROWS = 8


def block_rows(rows_per_expert: float, dtype: torch.dtype) -> int:
    """Rows of a block: the smallest of 16, 32, 64 and 128 that holds the average expert's rows."""
    rows = min(_row_class(rows_per_expert), 128)
    return min(rows, 64) if _is_exact(dtype) else rows


def choose(
    product: Product, rows_per_expert: float, outs: int, inner: int, dtype: torch.dtype, device: torch.device
) -> Tile:
    """The tile for a product; its rows are `block_rows`, but for weight gradients.

    Args:
        product: which product.
        rows_per_expert: average over experts.
        outs: columns of the result.
        inner: length of the sum; for weight gradients the rows of the result.
        dtype: of the factors.
        device: where it runs.
    """
    tile = lookup(product, _row_class(rows_per_expert), dtype, shared_memory(device))
    if product == "weight_gradient":
        return replace(tile, rows=min(tile.rows, _covering(inner)), outs=min(tile.outs, _covering(outs)))
    return replace(tile, outs=min(tile.outs, _covering(outs)), inner=min(tile.inner, _covering(inner)))


def lookup(product: Product, row_class: int, dtype: torch.dtype, limit: int) -> Tile:
    """The tile of a row of the table on a card.

    Args:
        product: which product.
        row_class: one of `ROW_CLASSES`.
        dtype: of the factors.
        limit: shared memory of one program, in bytes.
    """
    if _is_exact(dtype):
        tile = _EXACT[product]
        tile = tile if product == "weight_gradient" else replace(tile, rows=min(tile.rows, row_class))
    elif row_class == 256 and limit >= _LARGE_SHARED_MEMORY:
        tile = _LARGE[product, row_class]
    else:
        tile = _TILES[product, min(row_class, 128)]
    if dtype.itemsize == 4 and not _is_exact(dtype):
        tile = replace(tile, inner=max(16, tile.inner // 2))
    while tile.num_stages > 1 and tile.shared_bytes(product, dtype.itemsize) > limit:
        tile = replace(tile, num_stages=tile.num_stages - 1)
    return tile


ROW_CLASSES = (16, 32, 64, 128, 256)
PRODUCTS: tuple[Product, ...] = get_args(Product)


def _row_class(rows_per_expert: float) -> int:
    return next((rows for rows in ROW_CLASSES if rows_per_expert <= rows), ROW_CLASSES[-1])


def _is_exact(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and dot_precision(dtype) == "ieee"


def _covering(size: int) -> int:
    """The smallest power of two that holds `size`, at least what the tensor cores need."""
    return max(16, triton.next_power_of_2(size))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Shared memory that one program may use on a device, in bytes."""
    if device.type != "cuda":
        return SMALLEST_SHARED_MEMORY
    return SHARED_MEMORY.get(torch.cuda.get_device_capability(device), SMALLEST_SHARED_MEMORY)
