"""Collectives that have started and are waited for later: all-to-all and all-gather of rows, in uneven parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.dist.exchange.traffic import Traffic

# Its name until torch 2.12, which 2.13 warns of.
_all_gather_even = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Pending(Protocol):
    """A tensor that others are still sending."""

    def wait(self) -> Tensor:
        """The tensor, once it is here; to be called once."""
        ...


@dataclass
class Transfer:
    """A collective that has started, and the tensors that it uses."""

    work: dist.Work
    result: Tensor
    sent: Tensor
    traffic: Traffic | None

    def wait(self) -> Tensor:
        with nullcontext() if self.traffic is None else self.traffic.waiting(self.result.device):
            self.work.wait()
        return self.result


@dataclass
class Then:
    """What becomes of a pending tensor once it is here."""

    pending: Pending
    finish: Callable[[Tensor], Tensor]

    def wait(self) -> Tensor:
        return self.finish(self.pending.wait())


def all_to_all(
    rows_SX: Tensor,
    sent_P: Sequence[int],
    received_P: Sequence[int],
    group: dist.ProcessGroup,
    traffic: Traffic | None = None,
    spare: int = 0,
) -> Transfer:
    """Start to send each rank its part of the rows and to receive its part.

    Args:
        rows_SX: rows for rank 0 first.
        sent_P: how many rows go to each rank.
        received_P: how many rows come from each rank.
        group: the ranks.
        traffic: where bytes and waiting are counted.
        spare: rows of zeros after those received.
    """
    received = sum(received_P)
    result_RX = rows_SX.new_empty(received + spare, *rows_SX.shape[1:])
    result_RX[received:] = 0
    rows_SX = rows_SX.contiguous()
    work = dist.all_to_all_single(
        result_RX[:received], rows_SX, list(received_P), list(sent_P), group=group, async_op=True
    )
    assert work is not None
    _count(traffic, group, rows_SX, sent_P)
    return Transfer(work, result_RX, rows_SX, traffic)


def all_gather(
    rows_SX: Tensor, rows_P: Sequence[int], group: dist.ProcessGroup, traffic: Traffic | None = None
) -> Transfer:
    """Start to collect the rows of all ranks, those of rank 0 first.

    Args:
        rows_SX: this rank's.
        rows_P: how many each rank has.
        group: the ranks.
        traffic: where bytes and waiting are counted.
    """
    if len(set(rows_P)) > 1:
        # No backend gathers uneven parts; each rank gets a copy of its own.
        repeated_SX = rows_SX.repeat(len(rows_P), *[1] * (rows_SX.dim() - 1))
        return all_to_all(repeated_SX, [rows_SX.shape[0]] * len(rows_P), rows_P, group, traffic)
    rows_SX = rows_SX.contiguous()
    result_RX = rows_SX.new_empty(sum(rows_P), *rows_SX.shape[1:])
    work = _all_gather_even(result_RX, rows_SX, group=group, async_op=True)
    assert work is not None
    _count(traffic, group, rows_SX, rows_P)
    return Transfer(work, result_RX, rows_SX, traffic)


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """What sums over ranks are computed in: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _count(traffic: Traffic | None, group: dist.ProcessGroup, rows_SX: Tensor, rows_P: Sequence[int]) -> None:
    if traffic is not None:
        row_bytes = rows_SX[:1].numel() * rows_SX.element_size()
        traffic.add(group, [rows * row_bytes for rows in rows_P])
