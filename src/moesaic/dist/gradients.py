"""Gradients of parameters that live on different meshes: summing replicas, and one norm over all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate


def sync_replicated(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Sum the gradients of parameters that every process of `group` holds, in one collective.

    A gradient that is missing here counts as zero, since another process may have one.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    gradients = []
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their common norm is at most `max_norm`; the norm before, a float32 scalar.

    Each process adds the squares of its shards, divided by the number of processes that hold the same, and one
    all-reduce over all processes gives the norm, whatever meshes there are.

    Args:
        parameters: plain ones count as equal on all processes; DTensors may be sharded over any mesh that leaves every
            process one part.
        max_norm: None for infinity.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    world = dist.get_world_size()
    shares = [_local(gradient).float().square().sum() * (_shards(gradient) / world) for gradient in gradients]
    device = gradients[0].device if gradients else torch.device("cpu")
    total = torch.stack(shares).sum() if shares else torch.zeros((), device=device)
    dist.all_reduce(total)
    norm = total.sqrt()
    scale = (max_norm or math.inf) / (norm + 1e-6)
    if scale < 1:
        for gradient in gradients:
            _local(gradient).mul_(scale)
    return norm


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _shards(gradient: Tensor) -> int:
    """Into how many different parts a gradient is split."""
    if not isinstance(gradient, DTensor):
        return 1
    mesh = gradient.device_mesh
    sizes = [mesh.size(axis) for axis, placement in enumerate(gradient.placements) if not isinstance(placement, Replicate)]
    return math.prod(sizes)
