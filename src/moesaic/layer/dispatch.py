"""Between the router and the experts: how tokens reach the experts that they picked, and how outputs come back.

On one device both are the identity. With expert parallelism an all-to-all carries tokens to the ranks that hold their
experts; `moesaic.dist` has it. A block sends first and arrives later, so that shared experts run while tokens travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Travel(Protocol):
    """Tokens on their way to experts, and the way back."""

    def arrive(self) -> tuple[Tensor, Tensor, Tensor]:
        """Wait for what the local experts must compute: rows_RD, index_RK, weight_RK.

        The experts' ordinary call takes them: an index counts local experts, their number stands for no expert here.
        """
        ...

    def combine(self, rows_RD: Tensor) -> Tensor:
        """y_TD: outputs taken back to the tokens that were sent, and summed for each."""
        ...


class Dispatch(Protocol):
    """Sends tokens to their experts."""

    def send(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, *, slots: int | None = None) -> Travel:
        """Send each token to the experts that it picked.

        Args:
            x_TD: hidden states.
            index_TK: picks as for experts.
            weight_TK: combine weights.
            slots: the most of these tokens that an expert can get, if something limits them.
        """
        ...


@dataclass(frozen=True)
class _Stay:
    x_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor

    def arrive(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x_TD, self.index_TK, self.weight_TK

    def combine(self, rows_RD: Tensor) -> Tensor:
        return rows_RD


class Local:
    """All experts are here."""

    def send(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, *, slots: int | None = None) -> Travel:
        return _Stay(x_TD, index_TK, weight_TK)


LOCAL = Local()
