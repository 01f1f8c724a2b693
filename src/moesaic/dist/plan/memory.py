"""Memory of a rank over one optimiser step: what stays, and the most that comes on top of it at any moment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moesaic.dist.layout import Layout
from moesaic.dist.plan.activations import Activations, Section
from moesaic.dist.plan.units import Unit

_MASTER = 4  # bytes of a gradient and of each AdamW average: all are float32


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that needs most.

    Attributes:
        parameters: float32 weights: the rank's shards and what every rank holds whole.
        gradients: of the same elements, once a step has all of them.
        optimizer: both AdamW averages of the same elements, and a step count for each tensor.
        activations: saved between forward and backward of one micro-batch.
        buffers: what FSDP adds at the peak: gathered parameters of the layer at work, and flat buffers of the
            collectives.
        workspace: what a layer needs at the peak beyond what it saves: intermediate results, whole gradients.
        peak: most that is alive at once. Gradients grow while activations shrink, so it is less than the sum.
        moment: when that is.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    workspace: int
    peak: int
    moment: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dict."""
        return asdict(self)


@dataclass(frozen=True)
class _Moment:
    name: str
    gradients: int
    saved: int
    buffers: int
    workspace: int

    @property
    def bytes(self) -> int:
        return self.gradients + self.saved + self.buffers + self.workspace


@dataclass(frozen=True)
class Rank:
    """The units of a model on one rank of a layout.

    Attributes:
        units: of the model.
        layout: of ranks.
        fsdp: whether FSDP runs: under torch.distributed also for one rank.
        param_itemsize: bytes of an element of a gathered parameter.
        prefetch: whether a layer is gathered while the one before it computes, as on accelerators.
    """

    units: tuple[Unit, ...]
    layout: Layout
    fsdp: bool
    param_itemsize: int = 4
    prefetch: bool = False

    @property
    def parameters(self) -> int:
        return sum(unit.bytes(self.layout) for unit in self.units)

    @property
    def trained(self) -> int:
        """Elements with a gradient."""
        return sum(unit.stored(self.layout, trained=True) for unit in self.units)

    @property
    def optimizer(self) -> int:
        tensors = sum(part.trained for unit in self.units for part in unit.parts)
        return 2 * _MASTER * self.trained + _MASTER * tensors

    def gradients(self, units: tuple[Unit, ...]) -> int:
        return _MASTER * sum(unit.stored(self.layout, trained=True) for unit in units)

    def of_layer(self, layer: int | None) -> tuple[Unit, ...]:
        return tuple(unit for unit in self.units if unit.layer == layer)

    def whole(self, layer: int | None) -> int:
        """Bytes of a layer's gathered parameters."""
        return self.param_itemsize * sum(unit.gathered(self.layout) for unit in self._gathered(layer))

    def gather_buffers(self, layer: int | None) -> int:
        """Bytes of the flat buffers that all-gathers of this layer fill: of all at once, or of the largest."""
        sizes = [
            unit.stored(self.layout) * unit.shards(self.layout)
            for unit in self._gathered(layer)
            if unit.shards(self.layout) > 1
        ]
        return self.param_itemsize * (sum(sizes) if self.prefetch else max(sizes, default=0))

    def reduce_buffer(self, layer: int | None) -> int:
        """Bytes of the largest flat buffer that a reduce-scatter of this layer reads."""
        sizes = [unit.stored(self.layout, trained=True) * unit.shards(self.layout) for unit in self._gathered(layer)]
        return _MASTER * max(sizes, default=0)

    def _gathered(self, layer: int | None) -> tuple[Unit, ...]:
        return tuple(unit for unit in self.of_layer(layer) if unit.kind in ("dense", "experts")) if self.fsdp else ()


def memory_of(rank: Rank, activations: Activations, *, accumulation_steps: int = 1) -> Memory:
    """The memory of an optimiser step.

    It walks through forward and backward, layer by layer. In the forward pass of layer l alive are the weights and
    AdamW averages, what the layers before saved, what l makes, its gathered parameters with the flat buffer of the
    collective, and the root's (embeddings, last norm, head), which stay gathered. In its backward pass alive are what
    layers up to l saved, gradients of those behind it, and what l computes: its whole gradients among it. With
    accumulation all gradients are there from the second micro-batch on.
    """
    moments = [*_forward(rank, activations, accumulation_steps), *_backward(rank, activations, accumulation_steps)]
    everything = rank.gradients(rank.units)
    moments.append(_Moment("optimiser step", everything, 0, 0, 0))
    static = rank.parameters + rank.optimizer
    most = max(moments, key=lambda moment: moment.bytes)
    return Memory(
        parameters=rank.parameters,
        gradients=everything,
        optimizer=rank.optimizer,
        activations=activations.saved,
        buffers=most.buffers,
        workspace=most.workspace,
        peak=static + most.bytes,
        moment=most.name,
    )


def _sections(activations: Activations) -> list[tuple[str, int | None, Section]]:
    layers = [(f"layer {index}", index, section) for index, section in enumerate(activations.layers)]
    return [("embedding", None, activations.embedding), *layers, ("head", None, activations.head)]


def _forward(rank: Rank, activations: Activations, accumulation_steps: int) -> Iterator[_Moment]:
    gradients, kept = 0, 0
    if accumulation_steps > 1:
        # The root's flat buffer of the micro-batch before is there until the next reduction.
        gradients, kept = rank.gradients(rank.units), rank.reduce_buffer(None)
    held = 0
    root, last_buffer = rank.whole(None), rank.gather_buffers(None)
    sections = _sections(activations)
    for place, (name, layer, section) in enumerate(sections):
        following = sections[place + 1][1] if rank.prefetch and place + 1 < len(sections) else None
        buffer = rank.gather_buffers(layer if following is None else following)
        own = rank.whole(layer) if layer is not None else 0
        # A flat buffer is freed when the next one has been filled.
        yield _Moment(f"forward of {name}", gradients, held, kept + root + own + max(buffer, last_buffer), section.forward)
        held += section.held
        last_buffer = buffer


def _backward(rank: Rank, activations: Activations, accumulation_steps: int) -> Iterator[_Moment]:
    everything = rank.gradients(rank.units)
    saved, done = activations.saved, 0
    root, last_buffer = rank.whole(None), rank.reduce_buffer(None) if accumulation_steps > 1 else 0
    sections = _sections(activations)
    for place in range(len(sections) - 1, -1, -1):
        name, layer, section = sections[place]
        before = sections[place - 1][1] if place else None
        own = rank.whole(layer) if layer is not None else 0
        # The flat buffer of a reduction is there until the next one.
        reduced = max(last_buffer, rank.reduce_buffer(layer) if layer is not None else 0)
        # The next layer is gathered in advance.
        prefetched = rank.gather_buffers(before) if before is not None else 0
        buffers = root + own + prefetched + reduced
        gradients = everything if accumulation_steps > 1 else done
        yield _Moment(f"backward of {name}", gradients, saved, buffers, section.backward)
        saved -= section.saved
        if layer is not None:
            done += rank.gradients(rank.of_layer(layer))
            last_buffer = rank.reduce_buffer(layer)
    if rank.fsdp:
        # Gathered parameters, their whole gradients, and the flat buffer into which these are copied.
        yield _Moment("reduction of the root", everything, 0, 2 * root + rank.reduce_buffer(None), 0)


def itemsize(dtype: torch.dtype | None) -> int:
    """Bytes of an element of a gathered parameter; None stands for float32."""
    return (dtype or torch.float32).itemsize
