"""Which expert and which rows each block of a grouped GEMM computes, worked out on the device.

The grid must be known on the host, the number of rows of each expert is only known on the device. So the grid is an
upper bound, a small kernel writes which blocks there are, and programs without a block end at once. The host never
waits, and CUDA graphs can capture it.
"""

# Triton's types describe neither launches nor values inside kernels.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


def sort_picks(index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort picks by expert, stable in token order, without waiting for the device.

    Args:
        index_TK: picks in [0, N]; N stands for no expert and comes last.
        num_experts: N.

    Returns:
        pick_S, which pick (t * K + k) stands at each row, int64; and end_N, one past the last row of each expert, int32.
    """
    # Radix sort takes time in proportion to the bits of a key.
    key_dtype = torch.int16 if num_experts < 2**15 else torch.int32
    expert_S, pick_S = index_TK.reshape(-1).to(key_dtype).sort(stable=True)
    experts = torch.arange(num_experts, dtype=key_dtype, device=index_TK.device)
    return pick_S, torch.searchsorted(expert_S, experts, right=True, out_int32=True)


@dataclass(frozen=True)
class Schedule:
    """Row blocks in expert order.

    Attributes:
        expert_B: expert of each block, -1 where there is no block.
        start_B: first row of each block; its last row is at most the end of its expert.
        block_rows: rows of a block.
    """

    expert_B: Tensor
    start_B: Tensor
    block_rows: int

    @property
    def num_blocks(self) -> int:
        """B, an upper bound on the blocks that there are."""
        return self.expert_B.numel()


def make_schedule(end_N: Tensor, num_rows: int, block_rows: int) -> Schedule:
    """Cut every expert's rows into blocks.

    Args:
        end_N: one past the last row of each expert.
        num_rows: S, at least 1.
        block_rows: rows of a block.
    """
    num_experts = end_N.numel()
    # Full blocks, plus one that isn't full for each expert with rows; and no block is without a row.
    bound = min(num_rows // block_rows + min(num_experts, num_rows), num_rows)
    expert_B = torch.empty(bound, dtype=torch.int32, device=end_N.device)
    start_B = torch.empty_like(expert_B)
    _schedule[(num_experts + 1,)](
        end_N, expert_B, start_B, bound, num_experts, block_rows, BLOCK=128, EXPERTS=triton.next_power_of_2(num_experts)
    )
    return Schedule(expert_B, start_B, block_rows)


@triton.jit(do_not_specialize=["bound"])
def _schedule(
    end_ptr,
    expert_ptr,
    start_ptr,
    bound,
    num_experts,
    block_rows,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Program e writes the blocks of expert e; the last program marks what is left over."""
    expert = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    before = experts < expert
    ends = tl.load(end_ptr + experts, mask=before, other=0)
    starts = tl.load(end_ptr + experts - 1, mask=before & (experts > 0), other=0)
    first_block = tl.sum((ends - starts + block_rows - 1) // block_rows, axis=0)
    if expert < num_experts:
        start = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
        rows = tl.load(end_ptr + expert) - start
        last_block = first_block + (rows + block_rows - 1) // block_rows
        label = expert
    else:
        start = 0
        last_block = bound
        label = -1
    for offset in range(first_block, last_block, BLOCK):
        block = offset + tl.arange(0, BLOCK)
        mask = block < last_block
        tl.store(expert_ptr + block, tl.full((BLOCK,), 0, tl.int32) + label, mask=mask)
        tl.store(start_ptr + block, start + (block - first_block) * block_rows, mask=mask)
