"""What the forward and the backward pass tell the native library: which rows each expert has, and where things are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.layer.kernels.native import library


@dataclass(frozen=True)
class Ordered:
    """Picks by expert; picks of no expert have no row.

    Attributes:
        pick_S: which pick (t * K + k) stands at each row.
        expert_G: experts that have rows, ascending.
        end_G: one past the last row of each.
        top_k: K.
    """

    pick_S: Tensor
    expert_G: Tensor
    end_G: Tensor
    top_k: int

    @property
    def rows(self) -> int:
        """S, without picks of no expert."""
        return self.pick_S.numel()


def order(index_TK: Tensor, num_experts: int) -> Ordered:
    """Sort picks by expert, stable in token order.

    Raises:
        IndexError: for a pick outside [0, num_experts].
    """
    picks = index_TK.numel()
    pick_S = torch.empty(picks, dtype=torch.int64)
    expert_G = torch.empty(min(picks, num_experts), dtype=torch.int64)
    end_G = torch.empty_like(expert_G)
    found = library.loaded().moesaic_order(
        index_TK.data_ptr(), picks, num_experts, pick_S.data_ptr(), expert_G.data_ptr(), end_G.data_ptr()
    )
    if found == -2:
        raise IndexError(f"picks must be in [0, {num_experts}], got {int(index_TK.min())} to {int(index_TK.max())}")
    if found < 0:
        raise MemoryError(f"no memory to order {picks} picks of {num_experts} experts")
    rows = int(end_G[found - 1]) if found else 0
    return Ordered(pick_S[:rows], expert_G[:found], end_G[:found], index_TK.shape[1])


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor with contiguous rows; weights have them, so only an unusual input is copied."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def weight_rows_of(weight_NOI: Tensor) -> Tensor:
    """A weight stored (out, in) or (in, out), whichever it is."""
    return weight_NOI if is_transposed(weight_NOI) else rows_of(weight_NOI)


def fresh(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor, on huge pages if it is large: page faults of 4 KiB cost ten times what it takes to write it."""
    tensor = torch.empty(shape, dtype=dtype)
    library.loaded().moesaic_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return tensor


def experts_call(
    x_TD: Tensor,
    up_NHD: Tensor,
    down_NDF: Tensor,
    up_bias_NH: Tensor | None,
    down_bias_ND: Tensor | None,
    ordered: Ordered,
    weight_TK: Tensor,
    activation: int,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> library.ExpertsCall:
    """The arguments that both passes have; rows of every tensor are contiguous. The caller keeps the tensors alive."""
    return library.ExpertsCall(
        library.DTYPES[x_TD.dtype],
        activation,
        gated,
        interleaved,
        is_transposed(up_NHD),
        is_transposed(down_NDF),
        alpha,
        limit,
        torch.get_num_threads(),
        x_TD.shape[0],
        ordered.top_k,
        x_TD.shape[1],
        down_NDF.shape[2],
        ordered.expert_G.numel(),
        ordered.expert_G.data_ptr(),
        ordered.end_G.data_ptr(),
        ordered.pick_S.data_ptr(),
        weight_TK.data_ptr(),
        x_TD.data_ptr(),
        x_TD.stride(0),
        up_NHD.data_ptr(),
        up_NHD.stride(0),
        _row_stride(up_NHD),
        down_NDF.data_ptr(),
        down_NDF.stride(0),
        _row_stride(down_NDF),
        None if up_bias_NH is None else up_bias_NH.data_ptr(),
        0 if up_bias_NH is None else up_bias_NH.stride(0),
        None if down_bias_ND is None else down_bias_ND.data_ptr(),
        0 if down_bias_ND is None else down_bias_ND.stride(0),
    )


def is_transposed(weight_NOI: Tensor) -> bool:
    """Whether a weight is stored (in, out)."""
    return weight_NOI.stride(2) != 1 and weight_NOI.stride(1) == 1


def _row_stride(weight_NOI: Tensor) -> int:
    return weight_NOI.stride(2) if is_transposed(weight_NOI) else weight_NOI.stride(1)
