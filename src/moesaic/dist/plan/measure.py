"""What a training step really needs, to hold predictions against: counted storages and the allocator's own record."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
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


class SentBytes(TorchDispatchMode):
    """While entered, counts what this rank sends to others.

    In a ring everybody sends its part to all but one for an all-gather or a reduce-scatter, and both for an all-reduce;
    an all-to-all sends what is for others.

    Attributes:
        by_collective: bytes by "all_gather", "reduce_scatter", "all_reduce" and "all_to_all".
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_collective: dict[str, int] = {"all_gather": 0, "reduce_scatter": 0, "all_reduce": 0, "all_to_all": 0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        count = _COLLECTIVES.get(func.name().removesuffix(".default"))
        if count is not None:
            name, sent = count(*args)
            self.by_collective[name] += sent
        return func(*args, **(kwargs or {}))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _all_gather(output: Tensor, input: Tensor, *_: Any) -> tuple[str, int]:
    return "all_gather", _bytes(output) - _bytes(input)


def _all_gather_functional(input: Tensor, size: int, *_: Any) -> tuple[str, int]:
    return "all_gather", (size - 1) * _bytes(input)


def _reduce_scatter(output: Tensor, input: Tensor, *_: Any) -> tuple[str, int]:
    return "reduce_scatter", _bytes(input) - _bytes(output)


def _all_reduce(tensors: list[Tensor], group: Any, *_: Any) -> tuple[str, int]:
    size = dist.ProcessGroup.unbox(group).size()
    return "all_reduce", round(sum(map(_bytes, tensors)) * 2 * (size - 1) / size)


def _all_to_all(output: Tensor, input: Tensor, group: Any, received: Any, parts: list[int], *_: Any) -> tuple[str, int]:
    return "all_to_all", _to_others(input, parts, dist.ProcessGroup.unbox(group))


def _all_to_all_functional(input: Tensor, received: Any, parts: list[int], group: str) -> tuple[str, int]:
    return "all_to_all", _to_others(input, parts, _resolve_process_group(cast(Any, group)))


def _to_others(input: Tensor, parts: list[int], group: dist.ProcessGroup) -> int:
    parts = parts or [input.shape[0] // group.size()] * group.size()
    return _bytes(input[:1]) * (sum(parts) - parts[group.rank()])


_COLLECTIVES: dict[str, Callable[..., tuple[str, int]]] = {
    "c10d::_allgather_base_": _all_gather,
    "_c10d_functional::all_gather_into_tensor": _all_gather_functional,
    "c10d::_reduce_scatter_base_": _reduce_scatter,
    "c10d::allreduce_": _all_reduce,
    "c10d::alltoall_base_": _all_to_all,
    "_c10d_functional::all_to_all_single": _all_to_all_functional,
}
