"""What a step needs besides parameters: measured on the model itself, with tensors that have sizes and no memory.

The model runs forward and backward on fake tensors, with one layer of each kind, and every storage is counted while it
is alive. So each router, attention and kernel counts as it is, and no formula has to follow it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import PreTrainedModel

from moesaic.dist.config import ParallelConfig
from moesaic.dist.layout import Layout
from moesaic.dist.placement import blocks_of, expert_placements, replicated_of
from moesaic.dist.plan.balanced import BalancedDispatch, Sent, exchanged_columns
from moesaic.dist.plan.live import LiveBytes
from moesaic.errors import UnsupportedModel
from moesaic.hf import MoesaicForCausalLM, MoesaicModel
from moesaic.hf.compat import whole_sequences
from moesaic.hf.families import family_of
from moesaic.layer import (
    Experts,
    MergedConfig,
    MergedTopKConfig,
    MoEBlock,
    MoESpec,
    SegmentMergedConfig,
    TopKConfig,
)

EMBEDDING, HEAD = "embedding", "head"
# Their layers gather the experts of all ranks to merge them.
_MERGING = (MergedConfig, MergedTopKConfig, SegmentMergedConfig)


@dataclass(frozen=True)
class MicroBatch:
    """What one rank runs forward and backward at a time.

    Attributes:
        sequences: B.
        length: tokens of a sequence.
        bf16: under bfloat16 autocast.
        gradient_checkpointing: layers are recomputed in the backward pass.
        columns: processes over which the columns of the token embedding are dealt out; 1 for a whole one.
        inputs: further integer inputs of the model, by name: "position_ids", "modality_ids" and "attention_mask" (B, S),
            "task_ids" (B,).
    """

    sequences: int
    length: int
    bf16: bool = False
    gradient_checkpointing: bool = False
    columns: int = 1
    inputs: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequences * self.length


@dataclass(frozen=True)
class Section:
    """Bytes of one part of a pass: a layer, what comes before the layers, or what comes after.

    Attributes:
        held: made in the forward pass and alive at its end.
        saved: of that, what is still alive when the backward pass begins (autocast has dropped its copies).
        forward: most that was alive while it ran, beyond what was there before.
        backward: most that was alive while its backward pass ran, beyond what was there before: gradients of its
            parameters, whole, included.
    """

    held: int
    saved: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Activations:
    """The sections of a pass.

    Attributes:
        embedding: before the layers: embeddings, masks, positions.
        layers: each decoder layer.
        head: after them: last norm, logits, loss.
        sent: what each layer sends to experts on other ranks; None where nothing travels.
        stand_in: what was put in place of something whose sizes depend on the data; empty if nothing was.
    """

    embedding: Section
    layers: tuple[Section, ...]
    head: Section
    sent: tuple[Sent | None, ...]
    stand_in: str = ""

    @property
    def saved(self) -> int:
        """Bytes alive between forward and backward."""
        return self.embedding.saved + sum(layer.saved for layer in self.layers) + self.head.saved


def measure_activations(
    model: PreTrainedModel,
    spec: MoESpec | None,
    batch: MicroBatch,
    layout: Layout,
    config: ParallelConfig,
    *,
    param_dtype: torch.dtype | None = None,
) -> Activations:
    """Run one micro-batch of a rank on fake tensors.

    Args:
        model: on the meta device, of all layers; it stays as it is.
        spec: its MoE layers; None for a dense model.
        batch: what to run.
        layout: of ranks; the load of experts is balanced.
        config: how tokens travel.
        param_dtype: dtype of parameters in use, as FSDP gathers them; routers keep theirs. None for their own.
    """
    first = _first_of_each_kind(model)
    arguments = (first, batch, layout, config, param_dtype)
    try:
        return _run(model, *arguments)
    except (DataDependentOutputException, DynamicOutputShapeException):
        # What such a router hands on depends on the text. One of the same number of picks has about its sizes.
        assert spec is not None
        found = _run(_with_top_k(model), *arguments)
        return replace(found, stand_in=f"router {spec.router.type} counted as top_k of the same picks")


def _layers(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that owns the list of decoder layers, and the list's name."""
    decoder = next((module for module in model.modules() if isinstance(module, MoesaicModel)), None)
    base = cast(PreTrainedModel, decoder.backbone if decoder is not None else model.base_model)
    return base, family_of(base.config).layers


def _first_of_each_kind(model: PreTrainedModel) -> list[int]:
    """For each layer the index of the first that is like it: same modules, parameters and settings."""
    owner, name = _layers(model)
    seen: dict[tuple[Any, ...], int] = {}
    return [seen.setdefault(_kind(layer), index) for index, layer in enumerate(getattr(owner, name))]


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())
    names = tuple(type(module).__name__ for module in layer.modules())
    settings = tuple(str(getattr(module, "config", "")) for module in layer.modules() if isinstance(module, MoEBlock))
    return shapes, names, getattr(layer, "attention_type", None), settings


def _run(
    model: PreTrainedModel,
    first: list[int],
    batch: MicroBatch,
    layout: Layout,
    config: ParallelConfig,
    param_dtype: torch.dtype | None,
) -> Activations:
    chosen = sorted(set(first))
    small = _with_layers(model, chosen)
    for block in blocks_of(small):
        _spread(block, layout, config, batch)
    with FakeTensorMode():
        _materialise(small, param_dtype)
        _stream(small, param_dtype, batch)
        small.train()
        if isinstance(small, MoesaicForCausalLM):
            small.set_training_progress(0.0)
        if batch.gradient_checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                small.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        sections = _Pass(small, batch).sections()
    sent = [_sent(layer) for layer in getattr(*_layers(small))]
    places = [chosen.index(like) for like in first]
    return Activations(
        sections[EMBEDDING],
        tuple(sections[str(place)] for place in places),
        sections[HEAD],
        tuple(sent[place] for place in places),
    )


def _sent(layer: nn.Module) -> Sent | None:
    dispatches = [block.dispatch for block in blocks_of(layer)]
    return next((dispatch.sent for dispatch in dispatches if isinstance(dispatch, BalancedDispatch)), None)


def _with_layers(model: PreTrainedModel, chosen: list[int]) -> PreTrainedModel:
    """A copy of the model that has only these layers."""
    owner, name = _layers(model)
    layers = getattr(owner, name)
    setattr(owner, name, nn.ModuleList(layers[index] for index in chosen))
    try:
        return copy.deepcopy(model)
    finally:
        setattr(owner, name, layers)


def _with_top_k(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    for block in blocks_of(model):
        picks = max(1, min(block.gate.num_experts, math.ceil(block.gate.picks)))
        layer, hidden = block.gate.layer, cast(Experts, block.experts).hidden_dim
        with torch.device("meta"):
            block.gate = TopKConfig(top_k=picks).build(hidden, block.gate.num_experts)
        block.gate.layer = layer
    return model


def _spread(block: MoEBlock, layout: Layout, config: ParallelConfig, batch: MicroBatch) -> None:
    """Leave a block the experts of one rank, and an exchange of balanced sizes."""
    experts, gate = block.experts, block.gate
    if layout.ep * layout.esp == 1 or isinstance(gate.config, _MERGING):
        return
    if not isinstance(experts, Experts):
        raise UnsupportedModel(f"experts of class {type(experts).__name__} can't be spread over processes")
    slots = None
    if block.capacity is not None and block.capacity.limits(training=True):
        slots = int(block.capacity.slots(torch.tensor(batch.tokens), gate.num_experts, gate.top_k, training=True))
    block.dispatch = BalancedDispatch(
        experts.num_experts,
        columns=max(1.0, gate.num_experts * gate.top_k / gate.picks),
        share=1.0 if block.depth is None else block.depth.capacity,
        ep=layout.ep,
        esp=layout.esp,
        exchange=config.exchange,
        slots=slots,
    )
    for name, parameter in list(experts.named_parameters(recurse=False)):
        shape = list(parameter.shape)
        for placement, size in zip(expert_placements(experts, name), (layout.ep, layout.esp), strict=True):
            shape[cast(Any, placement).dim] = -(-shape[cast(Any, placement).dim] // size)
        experts.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta", dtype=parameter.dtype)))
    experts.num_experts //= layout.ep


def _materialise(model: nn.Module, param_dtype: torch.dtype | None) -> None:
    """Fake CPU tensors in place of those on the meta device; ties stay."""
    kept = {parameter for block in blocks_of(model) for parameter in replicated_of(block)}
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:
                dtype = parameter.dtype if param_dtype is None or parameter in kept else param_dtype
                made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
            module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _stream(model: PreTrainedModel, param_dtype: torch.dtype | None, batch: MicroBatch) -> None:
    """Let embeddings begin the stream of hidden states as `parallelize` has them do it."""
    if batch.columns > 1:
        embedding = cast(nn.Embedding, model.get_input_embeddings())
        width = embedding.embedding_dim // batch.columns
        embedding.weight = nn.Parameter(torch.empty(embedding.num_embeddings, width))
        embedding.register_forward_pre_hook(lambda module, args: args[0].reshape(1, -1).repeat(batch.columns, 1))
        embedding.register_forward_hook(functools.partial(_exchange_columns, batch))
    if param_dtype is not None:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(_widen)


def _exchange_columns(batch: MicroBatch, module: nn.Module, args: Any, columns_WTC: Tensor) -> Tensor:
    return exchanged_columns(columns_WTC).view(batch.sequences, batch.length, -1)


def _widen(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.float()


class _Pass:
    """One forward and backward pass, with what is alive noted where sections meet."""

    def __init__(self, model: PreTrainedModel, batch: MicroBatch) -> None:
        self.model, self.batch = model, batch
        owner, name = _layers(model)
        self.layers = list(getattr(owner, name))
        self.names = [EMBEDDING, *map(str, range(len(self.layers))), HEAD]
        self.forward: dict[str, int] = {}
        self.backward: dict[str, int] = {}
        # Other tensors that were there before, such as inputs, are counted: they are held for the whole step.
        self.count = LiveBytes([*model.parameters(), *model.buffers()])
        self._started = 0

    def sections(self) -> dict[str, Section]:
        for index, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(self._before(index))
        self.layers[-1].register_forward_hook(self._after_last)
        with self.count:
            self._begin(EMBEDDING)
            inputs = self._inputs()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.batch.bf16):
                # The training loop keeps the loss and what the routers did, and lets go of the logits.
                loss, routing = self._objective(inputs)
                self._end(self.forward, HEAD)
                held = dict(self.count.by_section)
            saved = dict(self.count.by_section)
            self._begin(HEAD)
            loss.backward()
            self._end(self.backward, self.count.section)
            del routing
        return {
            name: Section(held.get(name, 0), saved.get(name, 0), self.forward[name], self.backward[name])
            for name in self.names
        }

    def _objective(self, inputs: Mapping[str, Tensor]) -> Any:
        extra = {"output_routing": True} if isinstance(self.model, MoesaicForCausalLM) else {}
        packed = "position_ids" in inputs
        with contextlib.nullcontext() if packed else whole_sequences():
            output = self.model(**inputs, num_items_in_batch=self.batch.tokens, use_cache=False, **extra)
        return output.loss, getattr(output, "routing", None)

    def _inputs(self) -> dict[str, Tensor]:
        shape = (self.batch.sequences, self.batch.length)
        names = ("input_ids", "labels", *self.batch.inputs)
        return {name: torch.zeros(shape[:1] if name == "task_ids" else shape, dtype=torch.int64) for name in names}

    def _begin(self, section: str) -> None:
        self.count.begin(section)
        self._started = self.count.live

    def _end(self, noted: dict[str, int], section: str) -> None:
        noted[section] = self.count.peak - self._started

    def _before(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            section = self.names[index]
            if self.count.section != section or section in self.forward:
                return  # recomputation
            self._end(self.forward, section)
            self._begin(self.names[index + 1])
            args[0].register_hook(self._backward_reaches(index))

        return hook

    def _after_last(self, module: nn.Module, args: Any, output: Any) -> None:
        if HEAD in self.forward or self.count.section == HEAD:
            return
        self._end(self.forward, self.names[-2])
        self._begin(HEAD)
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.register_hook(self._backward_reaches(len(self.layers)))

    def _backward_reaches(self, boundary: int) -> Any:
        """Called with the gradient of the hidden states before layer `boundary`: its own backward pass is over."""

        def hook(gradient: Tensor) -> None:
            self._end(self.backward, self.names[boundary + 1])
            self._begin(self.names[boundary])

        return hook
