"""Where every tensor of a model lives: the one rule that sharding, checkpoints and the memory model follow.

docs/contracts/sharding.md has it as a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from moesaic.dist.mesh import Meshes
from moesaic.layer import Experts, MoEBlock

Kind = Literal["dense", "experts", "replicated", "embedding"]

# Of a token embedding that is dealt out, on the mesh of all processes.
COLUMNS = (Shard(1),)


@dataclass(frozen=True)
class Placed:
    """A parameter and the rule that places it.

    Attributes:
        name: its name in the model.
        parameter: itself.
        kind: "dense" is sharded over (dp_replicate, dp_shard), "experts" over the sparse mesh, "replicated" is whole
            everywhere, "embedding" has its columns dealt out over all processes.
        experts: the module that owns it, if these are experts.
    """

    name: str
    parameter: nn.Parameter
    kind: Kind
    experts: Experts | None = None

    def local(self, whole: Tensor, meshes: Meshes) -> Tensor:
        """What this process keeps of the whole tensor; a view where that can be.

        Args:
            whole: its value.
            meshes: of the layout.
        """
        if self.kind == "replicated":
            return whole
        if self.kind == "embedding":
            return local_part(whole, meshes.world, COLUMNS)
        if self.experts is None:
            return _fsdp_part(whole, 0, meshes.dense.size(1), meshes.dense.get_local_rank(1))
        leaf, axis = self.name.rpartition(".")[2], meshes.expert_data
        part = local_part(whole, meshes.experts, expert_placements(self.experts, leaf))
        return _fsdp_part(part, fsdp_dimension(leaf, part, axis.size(1)), axis.size(1), axis.get_local_rank(1))


def placed_parameters(model: nn.Module) -> Iterator[Placed]:
    """All parameters of a model with the rule that places them.

    Routers (and depth gates) are replicated: they are small, run in full precision, and the cell of a recurrent router
    is used by layers that do not own it.
    """
    experts: dict[nn.Parameter, Experts] = {}
    replicated: set[nn.Parameter] = set()
    for block in blocks_of(model):
        experts.update(dict.fromkeys(block.experts.parameters(), cast(Experts, block.experts)))
        replicated.update(replicated_of(block))
    for name, parameter in model.named_parameters():
        kind: Kind = "experts" if parameter in experts else "replicated" if parameter in replicated else "dense"
        if isinstance(parameter, DTensor) and parameter.placements == COLUMNS:
            kind = "embedding"
        yield Placed(name, parameter, kind, experts.get(parameter))


def blocks_of(model: nn.Module) -> list[MoEBlock]:
    """The MoE blocks of a model, lowest first."""
    return [module for module in model.modules() if isinstance(module, MoEBlock)]


def replicated_of(block: MoEBlock) -> list[nn.Parameter]:
    """Parameters of a block that every process holds."""
    gates = [gate for gate in (block.gate, block.depth_gate) if gate is not None]
    return [parameter for gate in gates for parameter in gate.parameters()]


def expert_placements(experts: Experts, name: str) -> tuple[Placement, Placement]:
    """Placement of a parameter of packed experts on the mesh (ep, esp).

    Whole experts over `ep`. Over `esp` each expert's hidden width F: rows of the first projection, of all its parts alike,
    and columns of the second. The second projection's bias is split by its only width, D.
    """
    if name.startswith("down_proj"):
        return Shard(0), Shard(1 if name.endswith("_bias") else 2)
    return Shard(0), _StridedShard(1, split_factor=experts.parts) if experts.parts > 1 else Shard(1)


def fsdp_dimension(name: str, parameter: Tensor, shards: int) -> int:
    """Dimension over which FSDP shards a local expert parameter: whole experts where they go round, else the width D.

    Where neither goes round it is whole experts after all: FSDP takes uneven parts of the first dimension only.

    Args:
        name: of the packed parameter.
        parameter: on (ep, esp).
        shards: processes to share it.
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    width = 1 if name.startswith("down_proj") else 2
    if local.shape[0] % shards == 0 or parameter.ndim < 3 or local.shape[width] % shards:
        return 0
    return width


def _fsdp_part(tensor: Tensor, dimension: int, shards: int, shard: int) -> Tensor:
    """What FSDP gives to one of `shards` processes: parts as `torch.chunk` makes them, and nothing for the rest."""
    parts = tensor.chunk(shards, dimension)
    return parts[shard] if shard < len(parts) else tensor.narrow(dimension, 0, 0)


def distribute(parameter: nn.Parameter, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> nn.Parameter:
    """A DTensor parameter with this process's part of a whole one; nothing is sent."""
    part = local_part(parameter.data, mesh, placements).clone()
    data = DTensor.from_local(
        part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def local_part(tensor: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Tensor:
    """This process's part of a whole tensor, a view where that can be; every shard must be equally large."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for axis, placement in enumerate(placements):
        count, place = mesh.size(axis), coordinate[axis]
        if isinstance(placement, Replicate) or count == 1:
            continue
        assert isinstance(placement, Shard | _StridedShard)
        blocks = placement.split_factor if isinstance(placement, _StridedShard) else 1
        split = tensor.unflatten(placement.dim, (blocks, count, -1))
        tensor = split.select(placement.dim + 1, place).flatten(placement.dim, placement.dim + 1)
    return tensor
