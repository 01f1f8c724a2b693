"""Expert parallelism: the experts of a layer are spread over ranks, and tokens travel to them and back.

Each rank of the expert-parallel group holds N / P experts in order. With expert sharding (ESP) the ranks of a second
group hold a slice of each of the same experts: they share their rows, and sum their parts of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moesaic.dist.exchange.all_gather import Everywhere
from moesaic.dist.exchange.collectives import all_gather
from moesaic.dist.exchange.flat import Flat
from moesaic.dist.exchange.hierarchical import Hierarchical
from moesaic.dist.exchange.padded import padded_pairs
from moesaic.dist.exchange.pairs import Mover, PairCarrier
from moesaic.dist.exchange.ragged import Ragged
from moesaic.dist.exchange.traffic import Traffic
from moesaic.dist.exchange.trip import Carrier, Outbound, bring_back, depart
from moesaic.errors import ConfigError
from moesaic.layer.capacity import CapacityConfig
from moesaic.layer.dispatch import LOCAL, Travel

ExchangeName = Literal["ragged", "padded", "all_gather"]
_Function = TypeVar("_Function", bound=Callable)


def _eager(function: _Function) -> _Function:
    """Compilers stop before it and go on after it: they know nothing of how many rows travel."""
    return cast(_Function, torch.compiler.disable(function))


class ExpertParallel:
    """The dispatch of a layer whose experts are spread over ranks; all ranks of the groups must call it alike.

    A token goes once to each rank that holds one of its picks, with all of its picks; that rank weights and sums what
    its experts give, and one row comes back. The rows of a token are summed in at least float32 in the order of the
    ranks. Picks of no expert (null, dropped, padding) never travel.

    Args:
        num_experts: N over all ranks.
        ep_group: the ranks over which the experts are spread, P.
        esp_group: the ranks that hold slices of the same experts; None for whole experts.
        exchange: "ragged": uneven parts; the host waits once a layer for their sizes. "padded": where a capacity limits
            the layer in the current mode, even parts of the size that it allows, without that wait, for which all ranks
            must send equally many tokens; elsewhere ragged. "all_gather": each rank gets all tokens; for small groups.
        node_groups: for the all-to-all in two steps, the ranks of all nodes with this local index, and those of this node.
        capacity: that of the layer, which "padded" needs.
        variable_width: K depends on the data, so that ranks must agree on it first; the host waits for it.
        traffic: where bytes, messages and waiting are counted.

    Raises:
        ConfigError: if the sizes don't fit, or an exchange lacks what it needs.
    """

    def __init__(
        self,
        num_experts: int,
        ep_group: dist.ProcessGroup,
        *,
        esp_group: dist.ProcessGroup | None = None,
        exchange: ExchangeName = "ragged",
        node_groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
        capacity: CapacityConfig | None = None,
        variable_width: bool = False,
        traffic: Traffic | None = None,
    ) -> None:
        size = ep_group.size()
        if num_experts % size:
            fitting = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
            raise ConfigError("parallel.ep", size, f"does not divide num_experts ({num_experts})", f"choose of {fitting}")
        if exchange == "padded" and (capacity is None or capacity.factor is None):
            raise ConfigError(
                "parallel.exchange",
                exchange,
                "needs a capacity that limits the layer in training",
                "set moe.capacity.factor, or exchange: ragged",
            )
        if exchange == "all_gather" and node_groups is not None:
            raise ConfigError(
                "parallel.all_to_all", "hierarchical", "does not go with exchange: all_gather", "set all_to_all: flat"
            )
        if node_groups is not None:
            _check_node_groups(ep_group, *node_groups)
        self.num_experts, self.exchange, self.traffic = num_experts, exchange, traffic
        self.variable_width = variable_width
        self._even_rows: int | None = None
        self._ep = ep_group
        self._esp = None if esp_group is None or esp_group.size() == 1 else esp_group
        self._mover: Mover = Flat(ep_group, traffic) if node_groups is None else Hierarchical(*node_groups, traffic)

    @property
    def num_local(self) -> int:
        """Experts on each rank, N / P."""
        return self.num_experts // self._ep.size()

    @_eager
    def send(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, *, slots: int | None = None) -> Travel:
        """Send tokens to the ranks of their experts; see `Dispatch`."""
        if self._ep.size() == 1 and self._esp is None:
            return LOCAL.send(x_TD, index_TK, weight_TK)
        if self.variable_width:
            index_TK, weight_TK = self._widened(index_TK, weight_TK)
        carriers = self._carriers(index_TK, slots)
        # 0 is no expert, which is also what stands in rows that no token fills.
        outbound = depart(carriers[0], x_TD, index_TK - self.num_experts, weight_TK, _travel_dtype(x_TD))
        return _Journey(carriers, outbound, x_TD.dtype, self.num_experts, self._ep.rank() * self.num_local, self.num_local)

    def _widened(self, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Picks of no expert added up to the largest K of all ranks."""
        width_1 = torch.tensor([index_TK.shape[1]], device=index_TK.device)
        for group in (self._ep, self._esp):
            if group is not None:
                dist.all_reduce(width_1, dist.ReduceOp.MAX, group)
        missing = int(width_1) - index_TK.shape[1]
        return F.pad(index_TK, (0, missing), value=self.num_experts), F.pad(weight_TK, (0, missing))

    def _carriers(self, index_TK: Tensor, slots: int | None) -> list[Carrier]:
        """The stages of the way: over the ranks with experts, and over those with slices of them."""
        tokens, size = index_TK.shape[0], self._ep.size()
        tokens_1 = torch.tensor([tokens], device=index_TK.device)
        if size == 1:
            _, rows_E = self._known(tokens_1.view(1, 1), tokens_1)
            return self._slices(rows_E)
        if self.exchange == "all_gather":
            tokens_P = all_gather(tokens_1, [1] * size, self._ep, self.traffic).wait()
            (tokens_each,), rows_E = self._known(tokens_P.unsqueeze(0), tokens_P.sum().view(1))
            return [Everywhere(self._ep, tokens_each, self.traffic), *self._slices(rows_E)]
        if self.exchange == "padded" and slots is not None:
            rows = self._agreed(min(tokens, self.num_local * slots), index_TK.device)
            pairs = padded_pairs(index_TK, self.num_experts, size, rows)
            even = PairCarrier(self._mover, pairs, [[rows] * size] * 3)
            return [even, *self._slices([rows * size] * (1 if self._esp is None else self._esp.size()))]
        ragged = Ragged(index_TK, self.num_experts, size)
        counts_CP = self._mover.learn(ragged.sent_P)
        counts, rows_E = self._known(counts_CP, counts_CP[1].sum().view(1))
        return [PairCarrier(self._mover, ragged.pairs(sum(counts[0])), counts), *self._slices(rows_E)]

    def _agreed(self, rows: int, device: torch.device) -> int:
        """Rows of an even part; where they change, a collective call makes sure that they do on all ranks."""
        if rows != self._even_rows:
            rows_1 = torch.tensor([rows], device=device)
            found = all_gather(rows_1, [1] * self._ep.size(), self._ep, self.traffic).wait().tolist()
            if len(set(found)) > 1:
                raise ConfigError(
                    "parallel.exchange",
                    "padded",
                    f"needs equal numbers of tokens, and ranks want to send {found} rows to each",
                    "use exchange: ragged, or rows that the ranks can share evenly",
                )
            self._even_rows = rows
        return rows

    def _slices(self, rows_E: Sequence[int]) -> list[Carrier]:
        """The stage over the ranks with slices of the same experts, from how many rows each of them gets."""
        return [] if self._esp is None else [Everywhere(self._esp, rows_E, self.traffic)]

    def _known(self, counts_CP: Tensor, rows_1: Tensor) -> tuple[list[list[int]], list[int]]:
        """Counts, and the rows that arrive at each rank with slices, on the host: the one wait of a layer for them."""
        rows_E = rows_1
        if self._esp is not None:
            rows_E = all_gather(rows_1, [1] * self._esp.size(), self._esp, self.traffic).wait()
        lists, ranks = counts_CP.shape
        host = torch.cat([counts_CP.reshape(-1), rows_E]).tolist()
        return [host[i * ranks : (i + 1) * ranks] for i in range(lists)], host[lists * ranks :]


@dataclass(frozen=True)
class _Journey:
    """Tokens on their way over one or two stages.

    Attributes:
        carriers: the stages in the order of the way out.
        outbound: the first one, which has started.
        dtype: of the tokens.
        num_experts: N over all ranks.
        first: the first expert of this rank.
        num_local: how many it has.
    """

    carriers: Sequence[Carrier]
    outbound: Outbound
    dtype: torch.dtype
    num_experts: int
    first: int
    num_local: int

    @_eager
    def arrive(self) -> tuple[Tensor, Tensor, Tensor]:
        rows_RD, index_RK, weight_RK = self.outbound.arrive()
        for carrier in self.carriers[1:]:
            rows_RD, index_RK, weight_RK = depart(carrier, rows_RD, index_RK, weight_RK).arrive()
        index_RK = index_RK + (self.num_experts - self.first)
        elsewhere_RK = (index_RK < 0) | (index_RK >= self.num_local)
        return rows_RD, index_RK.masked_fill(elsewhere_RK, self.num_local), weight_RK.masked_fill(elsewhere_RK, 0)

    @_eager
    def combine(self, rows_RD: Tensor) -> Tensor:
        *others, last = reversed(self.carriers)
        for carrier in others:
            rows_RD = bring_back(carrier, rows_RD, rows_RD.dtype)
        return bring_back(last, rows_RD, self.dtype)


def _travel_dtype(x_TD: Tensor) -> torch.dtype:
    """Under autocast the dtype that experts would cast tokens to anyway; like torch's linear it leaves float64 alone."""
    device = x_TD.device.type
    if torch.is_autocast_enabled(device) and x_TD.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x_TD.dtype


def _check_node_groups(ep: dist.ProcessGroup, node: dist.ProcessGroup, local: dist.ProcessGroup) -> None:
    ranks, here, size = dist.get_process_group_ranks(ep), ep.rank(), local.size()
    start = here // size * size
    expected = (ranks[here % size :: size], ranks[start : start + size])
    found = (dist.get_process_group_ranks(node), dist.get_process_group_ranks(local))
    if found != expected:
        raise ConfigError(
            "node_groups", found, f"do not split the expert-parallel ranks {ranks} by node", f"use {expected}"
        )
