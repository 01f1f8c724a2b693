"""AdamW with the usual parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from moesaic.train.config import TrainConfig

# Devices for which torch has a fused AdamW kernel.
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, but not to biases, which packed experts hold as (N, H) matrices."""
    return parameter.ndim >= 2 and not name.endswith("bias")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters as optimiser groups: decayed and not, and by device mesh, since one kernel takes one mesh."""
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((is_decayed(name, parameter), mesh), []).append(parameter)
    decayed_first = sorted(groups.items(), key=lambda group: not group[0][0])
    return [{"params": found, "weight_decay": weight_decay * decayed} for (decayed, _), found in decayed_first]


def build_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> AdamW:
    """AdamW over `model`, which must already be on `device`; fused where torch has it."""
    return AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=device.type in _FUSED_DEVICES,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
