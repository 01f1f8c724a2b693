"""Counting what models compute while they generate: passes, positions, and weights read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.errors import UnsupportedModel
from moesaic.hf.routing_source import RoutingSource, routing_source
from moesaic.hf.weight_sizes import WeightSizes, weight_sizes
from moesaic.infer.decode.cost import Work, pass_bytes
from moesaic.infer.decode.positions import positions_in
from moesaic.layer import Routing, RoutingContext


class WorkCount:
    """What has been computed so far.

    Attributes:
        work: all of it.
    """

    def __init__(self) -> None:
        self.work = Work()


@contextlib.contextmanager
def count_work(*models: PreTrainedModel) -> Iterator[WorkCount]:
    """Count every forward pass of some models inside the block.

        with count_work(model) as count:
            model.generate(...)
        count.work.weight_bytes

    Experts are counted from the routing of each pass, so what is read follows the picks that were really made, by an override
    or a weak row too. Listening takes time: don't measure seconds inside the block.

    Args:
        models: ours, stock MoE models, dense ones; each module once.
    """
    count = WorkCount()
    with contextlib.ExitStack() as stack:
        for model in {id(model): model for model in models}.values():
            stack.enter_context(_counting(model, count))
        yield count


@contextlib.contextmanager
def _counting(model: PreTrainedModel, count: WorkCount) -> Iterator[None]:
    sizes, source = weight_sizes(model), _source(model)
    listener = _Listener(sizes, count)
    head = model.get_output_embeddings()
    handles = [model.register_forward_pre_hook(listener.before, with_kwargs=True)]
    if isinstance(head, nn.Module):
        handles.append(head.register_forward_pre_hook(listener.head))
    heard = None if source is None else source.listen(listener.routed)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if heard is not None:
            heard.remove()


def _source(model: PreTrainedModel) -> RoutingSource | None:
    try:
        return routing_source(model)
    except UnsupportedModel:
        return None  # nothing but shared weights


class _Listener:
    def __init__(self, sizes: WeightSizes, count: WorkCount) -> None:
        self._sizes, self._count = sizes, count

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        nothing = dict.fromkeys(self._sizes.experts, 0.0)
        self._count.work += Work(1, positions_in(args, kwargs), pass_bytes(self._sizes, nothing, heads=0))

    def head(self, module: nn.Module, args: tuple) -> None:
        self._count.work += Work(weight_bytes=self._sizes.head)

    def routed(self, context: RoutingContext) -> None:
        experts = {layer: _distinct(routing, context.mask_T) for layer, routing in context.records.items()}
        read = sum(self._sizes.experts[layer] * number for layer, number in experts.items())
        self._count.work += Work(weight_bytes=read, experts=sum(experts.values()), layers=len(experts))


def _distinct(routing: Routing, mask_T: Tensor | None) -> int:
    """Experts that tokens of a pass picked; all of them where tokens don't pick."""
    if routing.assignment is not None:
        return routing.num_experts
    index_TK = routing.index_TK
    # Padding of a mask that is longer than the tokens of the pass belongs to earlier ones.
    if mask_T is not None and len(mask_T) == len(index_TK):
        index_TK = index_TK[mask_T]
    return int(torch.unique(index_TK[index_TK < routing.num_experts]).numel())
