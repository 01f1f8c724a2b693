"""What a model's parameters need on a rank, unit by unit, from shapes and the rule that places them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import Shard

from moesaic.dist.layout import Layout
from moesaic.dist.placement import Kind, blocks_of, expert_placements, fsdp_dimension, placed_parameters
from moesaic.hf.backbone import decoder_layers
from moesaic.layer import Experts

@dataclass(frozen=True)
class Part:
    """One parameter.

    Attributes:
        name: its name in the model.
        shape: of the whole parameter.
        kind: which rule places it.
        itemsize: bytes of an element.
        trained: whether it has a gradient.
        sparse_dimensions: of an expert parameter, the dimensions split over `ep` and `esp`.
        packed_name: of an expert parameter, its name in the experts module.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    itemsize: int
    trained: bool
    sparse_dimensions: tuple[int, int] = (0, 0)
    packed_name: str = ""

    def whole(self, layout: Layout) -> tuple[int, ...]:
        """Shape on a rank while FSDP has it gathered: of an expert parameter the part of its (ep, esp) place."""
        shape = list(self.shape)
        if self.kind == "experts":
            for dimension, size in zip(self.sparse_dimensions, (layout.ep, layout.esp), strict=True):
                shape[dimension] = -(-shape[dimension] // size)
        return tuple(shape)

    def stored(self, layout: Layout) -> int:
        """Elements that the rank with most holds between uses."""
        shape = self.whole(layout)
        if self.kind == "replicated":
            return math.prod(shape)
        if self.kind == "embedding":
            return math.prod(shape) // layout.world
        if self.kind == "dense":
            return -(-shape[0] // layout.dp_shard) * math.prod(shape[1:]) if shape else 1
        dimension = _fsdp_dimension(self.packed_name, shape, layout.edp_shard)
        return -(-shape[dimension] // layout.edp_shard) * math.prod(shape) // shape[dimension]


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers and reduces together. Those that it leaves alone, of routers and of an embedding whose
    columns are dealt out, stand in units of their own.

    Attributes:
        name: of the module.
        kind: which rule places its parameters.
        layer: index of the decoder layer; None outside layers.
        parts: the parameters.
    """

    name: str
    kind: Kind
    layer: int | None
    parts: tuple[Part, ...]

    def shards(self, layout: Layout) -> int:
        """Ranks from which FSDP gathers it."""
        return {"dense": layout.dp_shard, "experts": layout.edp_shard}.get(self.kind, 1)

    def stored(self, layout: Layout, *, trained: bool = False) -> int:
        """Elements on the rank with most, all or only the trained ones."""
        return sum(part.stored(layout) for part in self.parts if part.trained or not trained)

    def gathered(self, layout: Layout) -> int:
        """Elements while gathered, padding left out."""
        return sum(math.prod(part.whole(layout)) for part in self.parts)

    def bytes(self, layout: Layout) -> int:
        """Bytes of `stored`."""
        return sum(part.stored(layout) * part.itemsize for part in self.parts)


def units_of(model: nn.Module, partitioned: nn.Parameter | None = None) -> tuple[Unit, ...]:
    """The units of a model, in the order of its layers, the root (embeddings, last norm, head) first.

    Args:
        model: a causal language model with whole parameters; on the meta device they cost nothing.
        partitioned: its token embedding, if the columns of that are dealt out.
    """
    experts = {
        parameter: (name, block.experts)
        for block in blocks_of(model)
        for name, parameter in block.experts.named_parameters()
    }
    layer_of = {p: index for index, layer in enumerate(decoder_layers(model)) for p in layer.parameters()}
    grouped: dict[tuple[int, Kind], list[Part]] = {}
    for placed in placed_parameters(model):
        parameter, kind = placed.parameter, placed.kind
        dimensions, packed_name = (0, 0), ""
        if parameter is partitioned:
            kind = "embedding"
        if kind == "experts":
            packed_name, module = experts[parameter]
            placements = expert_placements(cast(Experts, module), packed_name)
            dimensions = cast(Shard, placements[0]).dim, cast(Shard, placements[1]).dim
        part = Part(
            placed.name,
            tuple(parameter.shape),
            kind,
            parameter.element_size(),
            parameter.requires_grad,
            dimensions,
            packed_name,
        )
        grouped.setdefault((layer_of.get(parameter, -1), kind), []).append(part)
    return tuple(_units(grouped))


def _units(grouped: dict[tuple[int, Kind], list[Part]]) -> Iterator[Unit]:
    for (layer, kind), parts in sorted(grouped.items(), key=lambda item: item[0][0]):
        where = "root" if layer < 0 else f"layer {layer}"
        name = {"dense": where, "replicated": f"{where} router"}.get(kind, f"{where} {kind}")
        yield Unit(name, kind, None if layer < 0 else layer, tuple(parts))


def _fsdp_dimension(name: str, shape: tuple[int, ...], shards: int) -> int:
    return fsdp_dimension(name, torch.empty(shape, device="meta"), shards)
