"""What a rank sends in one optimiser step, collective by collective, and how long that takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moesaic.dist.config import ParallelConfig
from moesaic.dist.layout import Layout
from moesaic.dist.plan.activations import MicroBatch
from moesaic.dist.plan.balanced import Sent
from moesaic.dist.plan.links import Cluster, Group, exchange_seconds, exchange_split, ring_seconds, ring_split
from moesaic.dist.plan.units import Unit

_GRADIENT = 4  # bytes; gradients are summed in float32
_ID = 8  # bytes of a token id
_COLUMN = 4  # bytes of an element of an embedding whose columns are dealt out
_INDEX = 4  # bytes; with each row go its picks
_WEIGHT = 4  # bytes; and their weights


@dataclass(frozen=True)
class Flow:
    """One kind of collective over an optimiser step.

    Attributes:
        name: what is sent.
        size: processes that take part.
        hosts: hosts that they are on.
        calls: collectives.
        inner: bytes that a rank sends within its host.
        outer: bytes that it sends to other hosts.
        seconds: time of all of them.
        hides: whether computation can go on meanwhile.
    """

    name: str
    size: int
    hosts: int
    calls: int
    inner: float
    outer: float
    seconds: float
    hides: bool

    @property
    def bytes(self) -> float:
        """Bytes that a rank sends."""
        return self.inner + self.outer

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict."""
        return asdict(self)


@dataclass(frozen=True)
class Sending:
    """The communication of a model in a layout.

    Attributes:
        units: of its parameters.
        sent: what each layer sends to experts on other ranks, or None.
        layout: of ranks.
        config: how tokens travel.
        batch: what a rank runs at a time.
        accumulation_steps: how often in a step.
        cluster: where ranks are.
        param_itemsize: bytes of an element that FSDP gathers.
    """

    units: tuple[Unit, ...]
    sent: tuple[Sent | None, ...]
    layout: Layout
    config: ParallelConfig
    batch: MicroBatch
    accumulation_steps: int
    cluster: Cluster
    param_itemsize: int = 4

    def flows(self) -> list[Flow]:
        """All collectives of a step whose volume grows with the model or the batch, those of size 1 left out."""
        found = [*self._parameters(), *self._embedding(), *self._tokens(), *self._replicas()]
        return [flow for flow in found if flow.size > 1 and flow.calls]

    def _parameters(self) -> Iterator[Flow]:
        """FSDP: gathered for the forward pass and again for the backward pass, but for the root's, which stay."""
        layout = self.layout
        groups: dict[Literal["dense", "experts"], Group] = {
            "dense": self.cluster.group(1, layout.dp_shard),
            "experts": self.cluster.group(layout.ep * layout.esp, layout.edp_shard),
        }
        for kind, group in groups.items():
            units = [unit for unit in self.units if unit.kind == kind]
            gathers = [(unit, 1 if unit.layer is None else 2) for unit in units]
            gathered = sum(times * unit.stored(layout) for unit, times in gathers) * self.param_itemsize
            reduced = sum(unit.stored(layout, trained=True) for unit in units) * _GRADIENT
            calls = self.accumulation_steps * sum(times for _, times in gathers)
            yield self._ring(f"gather {kind}", group, calls, self.accumulation_steps * gathered)
            calls = self.accumulation_steps * len(units)
            yield self._ring(f"reduce {kind}", group, calls, self.accumulation_steps * reduced)

    def _embedding(self) -> Iterator[Flow]:
        """With the columns of the token embedding dealt out: ids to all, rows back, and their gradients."""
        if self.batch.columns == 1:
            return
        world, times = self.cluster.group(1, self.layout.world), self.accumulation_steps
        (part,) = [part for unit in self.units if unit.kind == "embedding" for part in unit.parts]
        yield self._ring("embedding ids", world, times, times * self.batch.tokens * _ID, hides=False)
        buffer = self.batch.tokens * part.shape[1] * _COLUMN
        yield self._exchange("embedding rows", world, [(2, buffer)], flat=True)

    def _replicas(self) -> Iterator[Flow]:
        """Gradients summed over replicas, once a step: HSDP's shards, and in one flat buffer those of routers."""
        layout = self.layout
        dense = self.cluster.group(layout.dp_shard, layout.dp_replicate)
        experts = self.cluster.group(layout.ep * layout.esp * layout.edp_shard, layout.edp_replicate)
        for kind, group in (("dense", dense), ("experts", experts)):
            units = [unit for unit in self.units if unit.kind == kind]
            elements = sum(unit.stored(layout, trained=True) for unit in units)
            yield self._reduce(f"sum {kind}", group, len(units), elements, hides=True)
        routers = [unit for unit in self.units if unit.kind == "replicated"]
        elements = sum(unit.stored(layout, trained=True) for unit in routers)
        world = self.cluster.group(1, layout.world)
        yield self._reduce("sum routers", world, min(1, len(routers)), elements, hides=False)

    def _tokens(self) -> Iterator[Flow]:
        """Tokens go to experts with their picks and weights; rows come back. Backward, gradients go the other way."""
        ep, esp = self.cluster.group(self.layout.esp, self.layout.ep), self.cluster.group(1, self.layout.esp)
        ways: dict[str, list[tuple[int, float]]] = {
            "send tokens": [],
            "fetch outputs": [],
            "send output gradients": [],
            "fetch token gradients": [],
        }
        for sent in self.sent:
            if sent is not None:
                rows, picks = sent.rows * sent.row_bytes, sent.rows * sent.picks
                ways["send tokens"].append((sent.sends, rows + picks * (_INDEX + _WEIGHT)))
                ways["fetch outputs"].append((sent.fetches, rows))
                ways["send output gradients"].append((1, rows))
                ways["fetch token gradients"].append((1, rows + picks * _WEIGHT))
        for name, exchanges in ways.items():
            yield self._exchange(name, ep, exchanges)
        everything = [(times, buffer) for exchanges in ways.values() for times, buffer in exchanges]
        calls = self.accumulation_steps * sum(times for times, _ in everything)
        shards = self.accumulation_steps * sum(times * buffer for times, buffer in everything)
        yield self._ring("share split experts", esp, calls, shards, hides=False)

    def _exchange(self, name: str, group: Group, exchanges: list[tuple[int, float]], *, flat: bool = False) -> Flow:
        """All-to-alls, each so many times with a buffer of so many bytes in a micro-batch.

        `flat` ones are what they are; others go the way that the config asks for.
        """
        calls = self.accumulation_steps * sum(times for times, _ in exchanges)
        if group.size == 1 or calls == 0:
            return Flow(name, group.size, group.hosts, 0, 0.0, 0.0, 0.0, False)
        buffers = self.accumulation_steps * sum(times * buffer for times, buffer in exchanges)
        if self.config.exchange == "all_gather" and not flat:
            sent = buffers * (group.size - 1) / group.size
            return self._walk(name, group, calls, sent, rounds=1, hides=False)
        two_steps = group.hosts > 1 and group.local > 1 and self.config.all_to_all != "flat"
        hierarchical = two_steps and not flat
        inner, outer = exchange_split(buffers, group, hierarchical=hierarchical)
        links = self.cluster.inner, self.cluster.outer
        seconds = calls * exchange_seconds(buffers / calls, group, *links, hierarchical=hierarchical)
        return Flow(name, group.size, group.hosts, calls, inner, outer, seconds, False)

    def _ring(self, name: str, group: Group, calls: int, shards: float, *, hides: bool = True) -> Flow:
        """All-gathers or reduce-scatters of which a rank's shards together have so many bytes."""
        return self._walk(name, group, calls, shards * (group.size - 1), rounds=1, hides=hides)

    def _reduce(self, name: str, group: Group, calls: int, elements: int, *, hides: bool) -> Flow:
        sent = 2 * elements * _GRADIENT * (group.size - 1) / group.size
        return self._walk(name, group, calls, sent, rounds=2, hides=hides)

    def _walk(self, name: str, group: Group, calls: int, sent: float, *, rounds: int, hides: bool) -> Flow:
        links = self.cluster.inner, self.cluster.outer
        inner, outer = ring_split(sent, group)
        seconds = 0.0 if calls == 0 else calls * ring_seconds(sent / calls, group, *links, rounds=rounds)
        return Flow(name, group.size, group.hosts, calls, inner, outer, seconds, hides)
