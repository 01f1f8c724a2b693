"""Load of one MoE layer over an optimiser step: what selection bias, adaptive coefficients and metrics read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.layer.record import Routing, RoutingContext


@dataclass(frozen=True)
class LayerLoad:
    """Counts over any number of forward passes, int64 on the device of the model; padding is left out.

    All of it are sums: loads are added over passes and over ranks.

    Attributes:
        chosen_M: selections of each column (experts, then null experts), before a capacity dropped any.
        load_N: picks that each expert computed.
        dropped: picks that a capacity dropped, scalar.
        tokens: real tokens, scalar.
        statistics: the record's `statistics`, float64.
    """

    chosen_M: Tensor
    load_N: Tensor
    dropped: Tensor
    tokens: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, routing: Routing, mask_T: Tensor | None = None) -> LayerLoad:
        """Count one record."""
        index_TK, choice_TK, dropped_TK = routing.index_TK, routing.choice_TK, routing.dropped_TK
        if mask_T is not None:
            index_TK, choice_TK = index_TK[mask_T], choice_TK[mask_T]
            dropped_TK = None if dropped_TK is None else dropped_TK[mask_T]
        return cls(
            chosen_M=_count(choice_TK, routing.num_columns),
            load_N=_count(index_TK, routing.num_experts),
            dropped=index_TK.new_zeros(()) if dropped_TK is None else dropped_TK.sum(),
            tokens=index_TK.new_full((), index_TK.shape[0]),
            statistics={name: value.to(torch.float64) for name, value in routing.statistics.items()},
        )

    def __add__(self, other: LayerLoad) -> LayerLoad:
        return LayerLoad(
            self.chosen_M + other.chosen_M,
            self.load_N + other.load_N,
            self.dropped + other.dropped,
            self.tokens + other.tokens,
            {name: value + other.statistics[name] for name, value in self.statistics.items()},
        )

    @property
    def drop_rate(self) -> Tensor:
        """Share of the picks of experts that were dropped, float64 scalar."""
        return self.dropped / (self.dropped + self.load_N.sum()).clamp(min=1).to(torch.float64)

    @property
    def null_share(self) -> Tensor:
        """Share of the selections that were null experts, float64 scalar; 0 for routers without."""
        nulls = self.chosen_M[self.load_N.numel() :].sum()
        return nulls / self.chosen_M.sum().clamp(min=1).to(torch.float64)

    @property
    def experts_per_token(self) -> Tensor:
        """Mean number of experts that a token ran, float64 scalar."""
        return self.load_N.sum() / self.tokens.clamp(min=1).to(torch.float64)


def loads_of(context: RoutingContext) -> dict[int, LayerLoad]:
    """The load of every MoE layer in one forward pass."""
    return {layer: LayerLoad.of(routing, context.mask_T) for layer, routing in context.records.items()}


def all_reduce_loads(loads: Mapping[int, LayerLoad], group: dist.ProcessGroup | None = None) -> dict[int, LayerLoad]:
    """Sums over the ranks of a data-parallel group; the loads themselves without torch.distributed.

    One collective, and a second one for statistics if there are any. All ranks must hold the same layers.
    """
    if not loads or not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return dict(loads)
    names = ("chosen_M", "load_N", "dropped", "tokens")
    counts = _summed([getattr(load, name) for load in loads.values() for name in names], group)
    statistics = _summed([value for load in loads.values() for value in load.statistics.values()], group)
    return {
        layer: replace(
            load,
            **{name: next(counts) for name in names},
            statistics={name: next(statistics) for name in load.statistics},
        )
        for layer, load in loads.items()
    }


def _summed(parts: list[Tensor], group: dist.ProcessGroup | None) -> Iterator[Tensor]:
    """Each tensor summed over the ranks."""
    if not parts:
        return
    total = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(total, group=group)
    for part, summed in zip(parts, total.split([part.numel() for part in parts]), strict=True):
        yield summed.view_as(part)


def _count(values_TK: Tensor, length: int) -> Tensor:
    return torch.bincount(values_TK.reshape(-1), minlength=length + 1)[:length]
