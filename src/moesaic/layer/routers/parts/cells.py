"""Recurrent cells that step over layers: one input and one state for each token."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CellName = Literal["gru", "rnn", "lstm"]
_GATES: dict[CellName, int] = {"gru": 3, "rnn": 1, "lstm": 4}


class Cell(nn.Module):
    """torch's GRUCell, RNNCell (tanh) or LSTMCell, with their parameters' names, order and initial values.

    Written out because it has to compute in the dtype of its input, not in that of its weights.

    Args:
        kind: which of the three.
        size: width P of input and output.
        learned_start: hold a start state of its own, `start` (W,), zero at first.
    """

    start: nn.Parameter | None

    def __init__(self, kind: CellName, size: int, *, learned_start: bool = False) -> None:
        super().__init__()
        self.kind: CellName = kind
        self.size = size
        rows = _GATES[kind] * size
        self.weight_ih = nn.Parameter(torch.empty(rows, size))
        self.weight_hh = nn.Parameter(torch.empty(rows, size))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))
        self.start = nn.Parameter(torch.empty(self.width)) if learned_start else None

    @property
    def width(self) -> int:
        """W, the width of the state: P, or 2P for "lstm", whose state is the output and then the memory."""
        return 2 * self.size if self.kind == "lstm" else self.size

    def forward(self, input_TP: Tensor, state_TW: Tensor) -> Tensor:
        """The next state, (T, W); its first P columns are the cell's output."""
        dtype = input_TP.dtype
        output_TP = state_TW[:, : self.size]
        from_input = F.linear(input_TP, self.weight_ih.to(dtype), self.bias_ih.to(dtype))
        from_state = F.linear(output_TP, self.weight_hh.to(dtype), self.bias_hh.to(dtype))
        if self.kind == "rnn":
            return torch.tanh(from_input + from_state)
        if self.kind == "lstm":
            take, keep, new, give = (from_input + from_state).chunk(4, dim=-1)
            memory_TP = keep.sigmoid() * state_TW[:, self.size :] + take.sigmoid() * new.tanh()
            return torch.cat([give.sigmoid() * memory_TP.tanh(), memory_TP], dim=-1)
        reset_in, update_in, new_in = from_input.chunk(3, dim=-1)
        reset_state, update_state, new_state = from_state.chunk(3, dim=-1)
        # The reset gate scales the projected state, its bias included, as in torch; not the state before its projection.
        new_TP = torch.tanh(new_in + torch.sigmoid(reset_in + reset_state) * new_state)
        keep_TP = torch.sigmoid(update_in + update_state)
        return (1 - keep_TP) * new_TP + keep_TP * output_TP

    def start_state(self, input_TP: Tensor) -> Tensor:
        """The state before the first layer: the learned one, or zeros."""
        tokens, dtype = input_TP.shape[0], input_TP.dtype
        if self.start is None:
            return input_TP.new_zeros(tokens, self.width)
        return self.start.to(dtype).expand(tokens, -1)

    def reset_parameters(self, std: float | None = None) -> None:
        """Uniform within 1 / sqrt(P) as in torch, or normal with `std`, biases too; the start state is zero."""
        for name, parameter in self.named_parameters():
            if name == "start":
                nn.init.zeros_(parameter)
            elif std is None:
                nn.init.uniform_(parameter, -(self.size**-0.5), self.size**-0.5)
            else:
                nn.init.normal_(parameter, std=std)
