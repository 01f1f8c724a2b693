"""What a training step really needs, to hold predictions against: counted storages and the allocator's own record."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank, by the names of `Memory`.

    Attributes:
        parameters: in storages of parameters.
        gradients: in storages of gradients, before the optimiser step.
        optimizer: in storages of the optimiser's state.
        peak: most that was allocated at once in a step, parameters and optimiser state included.
    """

    parameters: int
    gradients: int
    optimizer: int
    peak: int


def measure_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[[], None], update: Callable[[], None]
) -> Measured:
    """Measure the second of two steps on the CPU; the first one makes the optimiser's state.

    Args:
        model: in training.
        optimizer: of its parameters.
        backward: forward and backward of a step, all its micro-batches.
        update: what follows, the optimiser step included; gradients are cleared after it here.
    """

    def step() -> int:
        backward()
        gradients = storage_bytes(p.grad for p in model.parameters() if p.grad is not None)
        update()
        optimizer.zero_grad(set_to_none=True)
        return gradients

    step()
    parameters = storage_bytes(model.parameters())
    state = storage_bytes(leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        gradients = step()
    return Measured(parameters, gradients, state, parameters + state + _most_allocated(profiled))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the local storages of tensors, each counted once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def _most_allocated(profiled: profile) -> int:
    """Most bytes on top of what was there when the profile began."""
    assert profiled.profiler is not None
    results = profiled.profiler.kineto_results
    assert results is not None
    changes: list[Any] = [event for event in results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@contextlib.contextmanager
def count_collectives() -> Iterator[dict[str, int]]:
    """Bytes that this rank sends to others while inside, by collective.

    Rings send all but one's own part once for an all-gather or a reduce-scatter and twice for an all-reduce; an
    all-to-all sends what is for others.
    """
    sent: dict[str, int] = {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0, "all_to_all": 0}

    def ring(name: str, part: Tensor, group: dist.ProcessGroup | None, share: float = 1.0) -> None:
        others = dist.get_world_size(group) - 1
        sent[name] += round(part.numel() * part.element_size() * others * share)

    def gather(output: Tensor, input: Tensor, group: Any = None, *_: Any, **__: Any) -> None:
        ring("all_gather", input, group)

    def scatter(output: Tensor, input: Tensor, op: Any = None, group: Any = None, *_: Any, **__: Any) -> None:
        ring("reduce_scatter", output, group)

    def reduce(tensor: Tensor, op: Any = None, group: Any = None, *_: Any, **__: Any) -> None:
        ring("all_reduce", tensor, group, 2 / dist.get_world_size(group))

    def exchange(
        output: Tensor, input: Tensor, received: Any = None, parts: Any = None, group: Any = None, *_: Any, **__: Any
    ) -> None:
        row = input[:1].numel() * input.element_size()
        parts = parts or [input.shape[0] // dist.get_world_size(group)] * dist.get_world_size(group)
        sent["all_to_all"] += row * (sum(parts) - parts[dist.get_rank(group)])

    counted = {
        "all_gather_single": gather,
        "all_gather_into_tensor": gather,
        "reduce_scatter_single": scatter,
        "reduce_scatter_tensor": scatter,
        "all_reduce": reduce,
        "all_to_all_single": exchange,
    }
    found = {name: getattr(dist, name) for name in counted if hasattr(dist, name)}
    for name, function in found.items():
        setattr(dist, name, _counting(function, counted[name]))
    try:
        yield sent
    finally:
        for name, function in found.items():
            setattr(dist, name, function)


def _counting(function: Callable[..., Any], count: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counting(*arguments: Any, **named: Any) -> Any:
        renamed = {_NAMES.get(name, name): value for name, value in named.items()}
        count(*arguments, **renamed)
        return function(*arguments, **named)

    return counting


_NAMES = {"output_tensor": "output", "input_tensor": "input", "input_split_sizes": "parts"}
