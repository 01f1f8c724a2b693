"""How many processes do what: the sizes of all meshes, checked against the number of processes and the experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moesaic.dist.config import ParallelConfig
from moesaic.errors import ConfigError
from moesaic.layer import MoESpec


@dataclass(frozen=True, order=True)
class Layout:
    """Sizes of the two views of the same processes.

    Dense parameters live on (dp_replicate, dp_shard), experts on (edp_replicate, edp_shard, ep, esp), both in rank
    order, the last axis varying fastest. So the processes that share an expert are neighbours, and those that share a
    group of experts come next.

    Attributes:
        dp_replicate: groups with the same dense shards.
        dp_shard: processes that share the dense parameters.
        ep: processes that share the experts of a layer.
        esp: processes that share one expert.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1
    esp: int = 1

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.dp_replicate * self.dp_shard

    @property
    def edp_shard(self) -> int:
        """Processes over which one set of local experts is sharded further (FSDP)."""
        return max(1, self.dp_shard // (self.ep * self.esp))

    @property
    def edp_replicate(self) -> int:
        """Groups that hold the same expert shards."""
        return self.world // (self.edp_shard * self.ep * self.esp)

    @property
    def nests(self) -> bool:
        """Whether the two views are nested, which keeps every group of one a union or a part of groups of the other."""
        shared = self.ep * self.esp
        return self.world % shared == 0 and (self.dp_shard % shared == 0 or shared % self.dp_shard == 0)

    @classmethod
    def of(cls, config: ParallelConfig, world: int, spec: MoESpec | None) -> Layout:
        """The layout that `config` asks for.

        Args:
            config: the `parallel` section.
            world: number of processes.
            spec: the MoE layers; None for a dense model.

        Raises:
            ConfigError: naming the field, with values that work.
        """
        if world % config.dp_replicate:
            raise ConfigError(
                "parallel.dp_replicate",
                config.dp_replicate,
                f"does not divide the {world} processes",
                f"choose from {_divisors(world)}",
            )
        shard = world // config.dp_replicate if config.dp_shard == "auto" else config.dp_shard
        if shard * config.dp_replicate != world:
            raise ConfigError(
                "parallel.dp_shard",
                config.dp_shard,
                f"times dp_replicate ({config.dp_replicate}) is not the number of processes ({world})",
                f"set it to {world // config.dp_replicate} or auto, or start {shard * config.dp_replicate} processes",
            )
        layout = cls(config.dp_replicate, shard, config.ep, config.esp)
        for name in ("ep", "esp"):
            problem = layout._misfit(name, spec)
            if problem is not None:
                works = sorted({getattr(other, name) for other in layouts(world, spec)})
                raise ConfigError(f"parallel.{name}", getattr(config, name), problem, f"choose from {works}")
        if not layout.nests:
            fitting = [other for other in layouts(world, spec) if (other.ep, other.esp) == (config.ep, config.esp)]
            proposals = [f"dp_replicate {other.dp_replicate}, dp_shard {other.dp_shard}" for other in fitting]
            raise ConfigError(
                "parallel.ep",
                config.ep,
                f"times esp ({config.esp}) neither divides dp_shard ({shard}) nor is a multiple of it that divides {world}",
                f"choose from {'; '.join(proposals)}" if proposals else f"choose ep from {_divisors(world)}",
            )
        return layout

    def _misfit(self, name: str, spec: MoESpec | None) -> str | None:
        """What is wrong with `ep` or `esp`, or None."""
        size = getattr(self, name)
        if self.world % size:
            return f"does not divide the {self.world} processes"
        if size == 1:
            return None
        if spec is None:
            return "needs MoE layers, which this model lacks"
        if name == "esp":
            width = spec.experts.intermediate_size
            return f"does not divide moe.experts.intermediate_size ({width})" if width % size else None
        for count in expert_counts(spec):
            if count % size:
                return f"does not divide moe.experts.num_experts ({count})"
        return None


def expert_counts(spec: MoESpec) -> tuple[int, ...]:
    """The different numbers of experts of the MoE layers."""
    return tuple(sorted(set(spec.layers.num_experts or (spec.experts.num_experts,))))


def layouts(world: int, spec: MoESpec | None) -> Iterator[Layout]:
    """All layouts of `world` processes that these MoE layers allow."""
    for replicate in _divisors(world):
        for ep in _divisors(world):
            for esp in _divisors(world // ep):
                layout = Layout(replicate, world // replicate, ep, esp)
                if layout.nests and layout._misfit("ep", spec) is None and layout._misfit("esp", spec) is None:
                    yield layout


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
