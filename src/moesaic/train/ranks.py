"""How the steps of a training are shared between processes: by one alone, or by many over torch.distributed."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import AutoConfig

from moesaic.dist import Layout, Sharded, clip_grad_norm, sync_replicated
from moesaic.dist.process import Process
from moesaic.errors import ConfigError
from moesaic.hf import MoesaicConfig
from moesaic.layer import LayerLoad, MoESpec
from moesaic.train.load import check_local_path
from moesaic.train.routing_load import over_layers
from moesaic.train.run import RunConfig

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class StepSums:
    """Quantities of a step that are added over processes, and what each process measured by itself.

    Attributes:
        values: sums over processes, as they were given.
        measured: by name, the value of each rank, in order.
    """

    values: list[float]
    measured: dict[str, list[float]] = field(default_factory=dict)


class Ranks(Protocol):
    """What a training step needs of all processes together; all of them call the same in the same order."""

    process: Process

    def count(self, number: int) -> int:
        """The sum of a number over processes."""
        ...

    def before_backward(self, *, last: bool) -> None:
        """A backward pass comes, of the last micro-batch of a step or not."""
        ...

    def clip(self, max_norm: float | None) -> float:
        """Sum gradients that are not summed yet, and scale all to a common norm; the norm before."""
        ...

    def reduce(self, values: Sequence[Tensor | float], seconds: float, received: int | None) -> StepSums:
        """Add quantities up, once in a step.

        Args:
            values: scalars.
            seconds: that this process has been at the step.
            received: signal that this process received; what one did is then agreed on.
        """
        ...

    def agreed_signal(self, received: int | None) -> int | None:
        """The signal that ends the run on all processes, given what this one received."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """A tensor summed over processes."""
        ...

    def metrics(self, sums: StepSums, loads: Mapping[int, LayerLoad]) -> dict[str, Any]:
        """What the metrics file says of the processes of a step; empty for one."""
        ...


class OneProcess:
    """A training that no other process takes part in.

    Args:
        model: what is trained.
    """

    process = Process()

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def count(self, number: int) -> int:
        return number

    def before_backward(self, *, last: bool) -> None:
        pass

    def clip(self, max_norm: float | None) -> float:
        return clip_grad_norm_(self.model.parameters(), max_norm or math.inf).item()

    def reduce(self, values: Sequence[Tensor | float], seconds: float, received: int | None) -> StepSums:
        return StepSums([float(value) for value in values])

    def agreed_signal(self, received: int | None) -> int | None:
        return received

    def sum(self, values: Tensor) -> Tensor:
        return values

    def metrics(self, sums: StepSums, loads: Mapping[int, LayerLoad]) -> dict[str, Any]:
        return {}


class ManyProcesses:
    """A training whose model is spread over the processes of torch.distributed.

    Args:
        process: this one.
        sharded: the model.
        device: what it computes on.
    """

    def __init__(self, process: Process, sharded: Sharded, device: torch.device) -> None:
        self.process, self.sharded, self.device = process, sharded, device
        self._signal: int | None = None

    def count(self, number: int) -> int:
        total = torch.tensor(number)
        dist.all_reduce(total)
        return int(total)

    def before_backward(self, *, last: bool) -> None:
        self.sharded.set_last_micro_batch(last)

    def clip(self, max_norm: float | None) -> float:
        sync_replicated(self.sharded.replicated)
        return clip_grad_norm(self.sharded.model.parameters(), max_norm).item()

    def reduce(self, values: Sequence[Tensor | float], seconds: float, received: int | None) -> StepSums:
        # One collective for all: sums, votes for signals, and a table of which each rank fills its row.
        traffic = self.sharded.traffic.take()
        measured = {"step_seconds": seconds, "all_to_all_seconds": traffic.seconds, "all_to_all_bytes": traffic.bytes}
        table = torch.zeros(self.process.world, len(measured), dtype=torch.float64)
        table[self.process.rank] = torch.tensor(list(measured.values()), dtype=torch.float64)
        votes = torch.tensor([number == received for number in _SIGNALS], dtype=torch.float64)
        sums = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values])
        flat = torch.cat([sums, votes.to(self.device), table.flatten().to(self.device)])
        dist.all_reduce(flat)
        added, voted, rows = flat.cpu().split([len(sums), len(votes), table.numel()])
        self._signal = next((number for number, votes in zip(_SIGNALS, voted, strict=True) if votes), self._signal)
        by_name = rows.view(table.shape).T.tolist()
        return StepSums(added.tolist(), dict(zip(measured, by_name, strict=True)))

    def agreed_signal(self, received: int | None) -> int | None:
        return self._signal

    def sum(self, values: Tensor) -> Tensor:
        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    def metrics(self, sums: StepSums, loads: Mapping[int, LayerLoad]) -> dict[str, Any]:
        waited, layout = sums.measured["all_to_all_seconds"], self.sharded.meshes.layout
        found: dict[str, Any] = {
            "processes": self.process.world,
            "step_seconds": _spread(sums.measured["step_seconds"]),
        }
        if layout.ep * layout.esp > 1:
            sent = int(sum(sums.measured["all_to_all_bytes"]))
            found["all_to_all"] = {"bytes": sent, "seconds": _spread(waited)}
        if layout.ep > 1 and loads:
            violation = {layer: rank_violation(load.load_N, layout.ep) for layer, load in loads.items()}
            found["rank_violation"] = over_layers(violation)
        return found


def check_parallel(run: RunConfig, process: Process) -> Layout | None:
    """The layout of the run over the processes of its job, checked before any work; None for a process alone.

    Raises:
        ConfigError: if `parallel` does not fit the number of processes or the experts, or the processes can't share the
            batch, or a field of `train` needs one process.
    """
    if not process.distributed:
        return None
    if run.train.compile and process.world > 1:
        raise ConfigError("train.compile", True, "is not possible over several processes", "set it to false")
    if run.data.batch_size % process.world:
        raise ConfigError(
            "data.batch_size",
            run.data.batch_size,
            f"cannot be shared by {process.world} processes",
            f"choose a multiple of {process.world}",
        )
    return Layout.of(run.parallel, process.world, _spec_of(run))


def _spec_of(run: RunConfig) -> MoESpec | None:
    """The MoE layers of the model that a run trains."""
    if run.initial_model is None:
        return run.moe
    check_local_path(run.initial_model)
    config = AutoConfig.from_pretrained(run.initial_model)
    return config.spec if isinstance(config, MoesaicConfig) else None


def rank_violation(load_N: Tensor, ranks: int) -> float:
    """Largest load of a rank that holds N / ranks experts over the mean load, minus 1; 0 is balanced."""
    load_R = load_N.view(ranks, -1).sum(1).double()
    return float(load_R.max() / load_R.mean().clamp(min=1e-9)) - 1 if load_R.any() else 0.0


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
