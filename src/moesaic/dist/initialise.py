"""A model with random weights that is spread over processes from the start: none ever holds all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moesaic.dist.config import ParallelConfig
from moesaic.dist.mesh import Meshes
from moesaic.dist.parallelize import Sharded, parallelize
from moesaic.dist.placement import blocks_of, placed_parameters, replicated_of
from moesaic.hf.initialise import InitialWeights


def build_sharded(
    build: Callable[[], PreTrainedModel],
    meshes: Meshes,
    config: ParallelConfig,
    *,
    device: torch.device,
    seed: int | None,
    param_dtype: torch.dtype | None = None,
) -> Sharded:
    """The model of `build`, spread over processes, with the weights that one process would give it after `seed`.

    Weights are bit for bit those of `torch.manual_seed(seed)` and `build()` on the CPU, in every layout: each process
    draws all of them, one module at a time, and keeps its own. So its peak of memory is its part of the model and the
    largest module (a token embedding, or the experts of a layer).

    Args:
        build: makes the model; called twice, on the meta device.
        meshes: of the layout.
        config: the `parallel` section.
        device: of this process.
        seed: torch's generator then is as it would be after `build()`. None for parameters that someone fills: they get
            memory, and buffers their values.
        param_dtype: as for `parallelize`.

    Raises:
        UnsupportedModel: if its experts can't be spread, or its weights not be drawn one module at a time.
        ConfigError: as for `parallelize`.
    """
    with torch.device("meta"):
        model = build()
    sharded = parallelize(model, meshes, config, param_dtype=param_dtype)
    allocate(sharded.model, device)
    # Storage came with new parameters.
    sharded.replicated = [parameter for block in blocks_of(sharded.model) for parameter in replicated_of(block)]
    weights, fill = InitialWeights(build), _Fill(sharded)
    if seed is None:
        weights.buffers(fill)
    else:
        torch.manual_seed(seed)
        weights.replay(fill)
    return sharded


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give a model on the meta device uninitialised storage on `device`; tied parameters stay tied."""
    tied: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                tied.setdefault(parameter, []).append((module, name))
    model.to_empty(device=device)
    for (first, first_name), *others in tied.values():
        for module, name in others:
            module._parameters[name] = first._parameters[first_name]


class _Fill:
    """Puts whole tensors into the shards of a model, by name."""

    def __init__(self, sharded: Sharded) -> None:
        self.meshes = sharded.meshes
        self.placed = {placed.name: placed for placed in placed_parameters(sharded.model)}
        self.buffers = dict(sharded.model.named_buffers())

    @torch.no_grad()
    def __call__(self, name: str, whole: Tensor) -> None:
        placed = self.placed.get(name)
        if placed is None:
            self.buffers[name].copy_(whole)
            return
        parameter = cast(Tensor, placed.parameter)
        target = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        target.copy_(placed.local(whole, self.meshes))
