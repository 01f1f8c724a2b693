"""What each router did by its own measure: experts run for a token, nulls, drops, and how much a state decided."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.hf import MoesaicModel
from moesaic.layer import Router, Routing, RoutingContext
from moesaic.trace.counts.positions import PositionCounts
from moesaic.trace.metrics import (
    FrequencyBucket,
    drop_rate,
    drop_rate_by_position,
    experts_by_frequency,
    experts_per_token,
    null_share,
)
from moesaic.trace.record import LayerTrace, RoutingTrace

QUARTERS = 4


@dataclass(frozen=True)
class RouterStatistics:
    """One MoE layer.

    Attributes:
        layer: index of the decoder layer.
        router: kind of router.
        experts_mean: experts that a token ran, mean over tokens.
        experts_std: its standard deviation; 0 when every token runs as many.
        null_share: share of the selections that were null experts.
        drop_rate: share of the picks of experts that a capacity dropped.
        unserved: share of the tokens that no expert computed.
        drops_by_position: drop rate in the quarters of the positions, first to last; empty without a capacity.
        by_frequency: experts run for tokens of the vocabulary by how frequent they are, rarest first.
        state_influence: share of picks that would be others had the state of the layers below been zero; None for
            routers without a state.
        readings: numbers of the router itself, such as its temperature.
    """

    layer: int
    router: str
    experts_mean: float
    experts_std: float
    null_share: float
    drop_rate: float
    unserved: float
    drops_by_position: list[float] = field(default_factory=list)
    by_frequency: list[FrequencyBucket] = field(default_factory=list)
    state_influence: float | None = None
    readings: dict[str, float] = field(default_factory=dict)


class StateInfluence:
    """Share of each layer's picks that the state handed up from the layers below decided; filled by `watch_state`."""

    def __init__(self) -> None:
        self._changed: dict[int, int] = {}
        self._picks: dict[int, int] = {}

    def of_layer(self, layer: int) -> float | None:
        """The share, or None for layers whose router has no state; 0 in the first MoE layer."""
        picks = self._picks.get(layer)
        return None if not picks else self._changed[layer] / picks

    def _compare(self, router: nn.Module, arguments: tuple[Any, ...], routing: Routing) -> None:
        x_TD, context = cast(tuple[Tensor, RoutingContext | None], (*arguments, None)[:2])
        if not isinstance(router, Router) or not router.config.carries_state or context is None:
            return
        alone = router.forward(x_TD, replace(context, records={}))
        real_T = torch.ones_like(routing.index_TK[:, 0], dtype=torch.bool) if context.mask_T is None else context.mask_T
        kept_TKK = routing.choice_TK[real_T].unsqueeze(-1) == alone.choice_TK[real_T].unsqueeze(-2)
        picks = int(real_T.sum()) * routing.top_k
        layer = router.layer
        self._picks[layer] = self._picks.get(layer, 0) + picks
        self._changed[layer] = self._changed.get(layer, 0) + picks - int(kept_TKK.any(-1).sum())


@contextlib.contextmanager
def watch_state(model: nn.Module) -> Iterator[StateInfluence]:
    """Measure the influence of router states on everything that runs inside the block.

    Each router with a state routes a second time without it; the model computes with the first result.
    """
    influence = StateInfluence()
    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            if isinstance(module, Router) and module.config.carries_state:
                stack.callback(module.register_forward_hook(influence._compare).remove)
        yield influence


def router_statistics(
    model: nn.Module, trace: RoutingTrace, influence: StateInfluence | None = None, *, buckets: int = 5
) -> list[RouterStatistics]:
    """Statistics of every MoE layer, lowest first.

    Args:
        model: that was traced.
        trace: recorded with `keep="tokens"`.
        influence: from `watch_state` around the same forward passes; None leaves `state_influence` out.
        buckets: frequency classes of tokens, each with about as many occurrences.

    Raises:
        ConfigError: if the trace holds no tokens, or is not of this model.
    """
    found = next((module for module in model.modules() if isinstance(module, MoesaicModel)), None)
    blocks = {} if found is None else found.moe_blocks()
    if trace.layers.keys() - blocks.keys():
        raise ConfigError(
            "trace", sorted(trace.layers), f"has other layers than the model ({sorted(blocks)})", "trace this model"
        )
    ids_T = trace.token_ids_T
    return [
        _statistics(layer, blocks[index].gate, ids_T, influence, buckets)
        for index, layer in sorted(trace.layers.items())
    ]


def _statistics(
    layer: LayerTrace, router: Router, ids_T: Tensor | None, influence: StateInfluence | None, buckets: int
) -> RouterStatistics:
    experts_T = experts_per_token(layer.index_TK, layer.num_experts).to(torch.float64)
    return RouterStatistics(
        layer=layer.layer,
        router=router.config.type,
        experts_mean=float(experts_T.mean()),
        experts_std=float(experts_T.std(correction=0)),
        null_share=null_share(layer.chosen_M, layer.num_experts),
        drop_rate=drop_rate(layer.chosen_M, layer.num_experts, layer.dropped),
        unserved=layer.unserved / max(layer.tokens, 1),
        drops_by_position=_drops_by_position(layer),
        by_frequency=[] if ids_T is None else experts_by_frequency(layer.index_TK, ids_T, layer.num_experts, buckets),
        state_influence=None if influence is None else influence.of_layer(layer.layer),
        readings=router.readings(),
    )


def _drops_by_position(layer: LayerTrace) -> list[float]:
    if not layer.domain_positions:
        return []
    counts = PositionCounts.total(layer.domain_positions.values())
    return drop_rate_by_position(counts.picks_P, counts.dropped_P, parts=QUARTERS).nan_to_num().tolist()


class StatisticsTables:
    """The statistics of all layers as tables for a terminal."""

    def __init__(self, statistics: list[RouterStatistics]) -> None:
        self.statistics = statistics

    def __rich__(self) -> Group:
        return Group(self._layers(), *filter(None, (self._frequency(), self._positions())))

    def _layers(self) -> Table:
        table = Table("layer", title="Routers", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("router", no_wrap=True)
        for name in ("experts\nper token", "null\nshare", "dropped", "no\nexpert", "decided\nby state"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.statistics:
            table.add_row(
                str(row.layer),
                row.router,
                f"{row.experts_mean:.2f} ± {row.experts_std:.2f}",
                f"{row.null_share:.1%}" if row.null_share else "-",
                f"{row.drop_rate:.1%}" if row.drop_rate else "-",
                f"{row.unserved:.1%}" if row.unserved else "-",
                "-" if row.state_influence is None else f"{row.state_influence:.1%}",
            )
        # As a column, what only some routers have would squeeze the others.
        table.caption = "\n".join(
            f"layer {row.layer}: " + ", ".join(f"{name} {value:.3g}" for name, value in row.readings.items())
            for row in self.statistics
            if row.readings
        )
        table.caption_justify = "left"
        return table

    def _frequency(self) -> Table | None:
        """Only where tokens differ in the number of their experts."""
        rows = [row for row in self.statistics if row.experts_std and row.by_frequency]
        if not rows:
            return None
        table = Table("layer", title="Experts per token by its frequency", title_justify="left", box=SIMPLE_HEAD)
        for bucket in rows[0].by_frequency:
            table.add_column(f"{bucket.least}-{bucket.most}", justify="right")
        for row in rows:
            table.add_row(str(row.layer), *(f"{bucket.experts:.2f}" for bucket in row.by_frequency))
        return table

    def _positions(self) -> Table | None:
        rows = [row for row in self.statistics if any(row.drops_by_position)]
        if not rows:
            return None
        table = Table("layer", title="Dropped by position, first to last", title_justify="left", box=SIMPLE_HEAD)
        parts = len(rows[0].drops_by_position)
        for part in range(parts):
            table.add_column(f"{part / parts:.0%}-{(part + 1) / parts:.0%}", justify="right")
        for row in rows:
            table.add_row(str(row.layer), *(f"{rate:.1%}" for rate in row.drops_by_position))
        return table
