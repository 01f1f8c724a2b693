"""`plan`: which layouts of a cluster a run fits, best first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from moesaic.dist.config import ParallelConfig
from moesaic.dist.embedding import partitionable
from moesaic.dist.layout import Layout, layouts
from moesaic.dist.plan.activations import Activations, MicroBatch, measure_activations
from moesaic.dist.plan.communication import Flow, Sending
from moesaic.dist.plan.links import Cluster
from moesaic.dist.plan.memory import Memory, Rank, itemsize, memory_of
from moesaic.dist.plan.quantities import short
from moesaic.dist.plan.units import Unit, units_of
from moesaic.errors import ConfigError
from moesaic.layer import MoESpec
from moesaic.trace import account

FORMULA = "step = compute + exposed + max(0, hidden - overlap * compute)"


@dataclass(frozen=True)
class Workload:
    """What a run does in an optimiser step.

    Attributes:
        batch_size: sequences of a global batch.
        sequence_length: tokens of each.
        accumulation_steps: batches in a step.
        bf16: computes in bfloat16.
        gradient_checkpointing: layers are recomputed in the backward pass.
        accelerated: runs on accelerators, where layers are gathered in advance.
        inputs: further inputs of the model; see `MicroBatch`.
    """

    batch_size: int
    sequence_length: int
    accumulation_steps: int = 1
    bf16: bool = False
    gradient_checkpointing: bool = False
    accelerated: bool = True
    inputs: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.batch_size * self.sequence_length * self.accumulation_steps

    def micro_batch(self, world: int, *, columns: int = 1) -> MicroBatch:
        """What one of `world` ranks runs at a time.

        Args:
            world: number of ranks.
            columns: ranks over which the columns of the token embedding are dealt out.

        Raises:
            ConfigError: if ranks can't share the batch evenly.
        """
        if self.batch_size % world:
            raise ConfigError(
                "data.batch_size",
                self.batch_size,
                f"cannot be shared by {world} processes",
                f"choose a multiple of {world}, or other --hosts and --gpus",
            )
        return MicroBatch(
            self.batch_size // world,
            self.sequence_length,
            self.bf16,
            self.gradient_checkpointing,
            columns,
            self.inputs,
        )


@dataclass(frozen=True)
class Candidate:
    """A layout and what it needs.

    Attributes:
        layout: sizes of the meshes.
        memory: of the rank that needs most.
        flows: what a rank sends in a step.
        compute_seconds: arithmetic of a step.
        seconds: a step, by `FORMULA`: `exposed` are flows that computation waits for, `hidden` the others.
        misfit: why it can't be used; empty if it can.
        stand_in: what was counted as something else; see `Activations`.
    """

    layout: Layout
    memory: Memory
    flows: tuple[Flow, ...]
    compute_seconds: float
    seconds: float
    misfit: str
    stand_in: str

    @property
    def inner_bytes(self) -> float:
        """Bytes that a rank sends within its host in a step."""
        return sum(flow.inner for flow in self.flows)

    @property
    def outer_bytes(self) -> float:
        """Bytes that a rank sends to other hosts in a step."""
        return sum(flow.outer for flow in self.flows)

    def parallel(self, config: ParallelConfig) -> dict[str, Any]:
        """The `parallel` section of a run that asks for this layout."""
        sizes = {name: getattr(self.layout, name) for name in ("dp_replicate", "dp_shard", "ep", "esp")}
        others = config.model_dump(exclude_defaults=True, exclude=set(sizes))
        return {**sizes, **others}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict."""
        return {
            **asdict(self.layout),
            "fits": not self.misfit,
            "misfit": self.misfit,
            "memory": self.memory.to_dict(),
            "flows": [flow.to_dict() for flow in self.flows],
            "inner_bytes": self.inner_bytes,
            "outer_bytes": self.outer_bytes,
            "compute_seconds": self.compute_seconds,
            "seconds": self.seconds,
            "stand_in": self.stand_in,
        }


@dataclass(frozen=True)
class Plan:
    """All layouts of a cluster for a run.

    Attributes:
        candidates: those that fit, fastest first, then the others, smallest first.
        parameters: of the model.
        workload: the run.
        cluster: the machines.
        config: how tokens travel.
    """

    candidates: tuple[Candidate, ...]
    parameters: int
    workload: Workload
    cluster: Cluster
    config: ParallelConfig

    @property
    def best(self) -> Candidate | None:
        """The fastest that fits."""
        first = self.candidates[0]
        return None if first.misfit else first

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict."""
        return {
            "parameters": self.parameters,
            "workload": asdict(self.workload),
            "cluster": asdict(self.cluster),
            "formula": FORMULA,
            "parallel": None if self.best is None else self.best.parallel(self.config),
            "layouts": [candidate.to_dict() for candidate in self.candidates],
        }


def plan(
    model: PreTrainedModel,
    spec: MoESpec | None,
    workload: Workload,
    cluster: Cluster,
    config: ParallelConfig | None = None,
    *,
    tell: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Predict memory and time of every layout.

    Args:
        model: a causal language model on the meta device; it stays as it is.
        spec: its MoE layers; None for a dense model.
        workload: what a step does.
        cluster: where it runs.
        config: how tokens travel; its sizes are not read.
        tell: told what is done.

    Raises:
        ConfigError: if ranks can't share the batch, or the columns of the token embedding where they are dealt out.
        UnsupportedModel: if the model holds experts that are not ours.
    """
    config = config or ParallelConfig()
    planner = _Planner(model, spec, workload, cluster, config, tell)
    found = [planner.candidate(layout) for layout in sorted(layouts(cluster.world, spec)) if layout.esp <= cluster.gpus]
    found.sort(key=lambda candidate: (candidate.misfit != "", *_order(candidate)))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Plan(tuple(found), parameters, workload, cluster, config)


def _order(candidate: Candidate) -> tuple[float, float, int]:
    memory, seconds = float(candidate.memory.peak), candidate.seconds
    # Of equals, experts stay whole.
    return (memory, seconds, candidate.layout.esp) if candidate.misfit else (seconds, memory, candidate.layout.esp)


class _Planner:
    def __init__(
        self,
        model: PreTrainedModel,
        spec: MoESpec | None,
        workload: Workload,
        cluster: Cluster,
        config: ParallelConfig,
        tell: Callable[[str], None],
    ) -> None:
        self.model, self.spec, self.workload = model, spec, workload
        self.cluster, self.config, self.tell = cluster, config, tell
        # A process alone trains without torch.distributed.
        self.fsdp = cluster.world > 1
        partitions = self.fsdp and config.partition_embedding
        self.batch = workload.micro_batch(cluster.world, columns=cluster.world if partitions else 1)
        partitioned = partitionable(model, cluster.world).weight if partitions else None
        self.units: tuple[Unit, ...] = units_of(model, cast(nn.Parameter | None, partitioned))
        self.param_dtype = torch.bfloat16 if workload.bf16 and self.fsdp else None
        # Activations depend on these sizes only.
        self.activations = functools.cache(self._activations)

    def candidate(self, layout: Layout) -> Candidate:
        activations = self.activations(layout.ep, layout.esp)
        rank = Rank(self.units, layout, self.fsdp, itemsize(self.param_dtype), self.workload.accelerated)
        memory = memory_of(rank, activations, accumulation_steps=self.workload.accumulation_steps)
        flows = Sending(
            self.units,
            activations.sent,
            layout,
            self.config,
            self.batch,
            self.workload.accumulation_steps,
            self.cluster,
            itemsize(self.param_dtype),
        ).flows()
        seconds = self._seconds(flows)
        return Candidate(
            layout, memory, tuple(flows), self.compute_seconds, seconds, self._misfit(memory), activations.stand_in
        )

    @functools.cached_property
    def compute_seconds(self) -> float:
        """Forward, twice that backward, and once more forward where layers are recomputed."""
        passes = 4 if self.workload.gradient_checkpointing else 3
        flops = account(self.model).flops_per_token(self.workload.sequence_length)
        return passes * flops * self.workload.tokens / self.cluster.world / self.cluster.flops

    def _seconds(self, flows: list[Flow]) -> float:
        exposed = sum(flow.seconds for flow in flows if not flow.hides)
        hidden = sum(flow.seconds for flow in flows if flow.hides)
        return self.compute_seconds + exposed + max(0.0, hidden - self.cluster.overlap * self.compute_seconds)

    def _misfit(self, memory: Memory) -> str:
        usable = self.cluster.memory * (1 - self.cluster.headroom)
        if memory.peak <= usable:
            return ""
        return f"needs {short(memory.peak)}B in {memory.moment}, {short(usable)}B are usable"

    def _activations(self, ep: int, esp: int) -> Activations:
        self.tell(f"activations at ep {ep}, esp {esp}")
        layout = Layout(1, ep * esp, ep, esp)
        return measure_activations(
            self.model, self.spec, self.batch, layout, self.config, param_dtype=self.param_dtype
        )

