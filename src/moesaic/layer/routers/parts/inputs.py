"""What routers take in: logits in full precision, and the ids of tokens, modalities and tasks, checked."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.layer.record import RoutingContext
from moesaic.layer.routers.base import Need

_FIELDS: dict[Need, tuple[str, str]] = {
    "token_ids": ("token_ids_T", "call the model with input_ids"),
    "modality": ("modality_T", "give the modality of each token"),
    "task": ("task_B", "give the task of each sequence"),
}


def linear(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b in float32, in float64 for float64 input, also under autocast: in bfloat16 scores of experts tie."""
    precision = torch.promote_types(x_TD.dtype, torch.float32)
    with torch.autocast(x_TD.device.type, enabled=False):
        bias_N = None if bias_N is None else bias_N.to(precision)
        return F.linear(x_TD.to(precision), weight_ND.to(precision), bias_N)


def ids_of(context: RoutingContext | None, need: Need, size: int, *, field: str) -> Tensor:
    """The ids that a router needs, int64, (T,) or for tasks (B,); 0 for padding.

    Args:
        context: where they are.
        need: which ones.
        size: how many different ids there can be.
        field: name of the router's field that says so.

    Raises:
        ConfigError: if they are not given, or one is not in [0, size). Off the CPU an id out of range fails as a
            device-side assertion, since a look at its value would stall every layer; compiled graphs do not look.
    """
    name, remedy = _FIELDS[need]
    ids = None if context is None else cast("Tensor | None", getattr(context, name))
    if context is None or ids is None:
        raise ConfigError(need, None, "is missing, and this router routes by it", remedy)
    ids = ids.long()
    if context.mask_T is not None and need != "task":
        ids = ids.masked_fill(~context.mask_T, 0)
    if not torch.compiler.is_compiling():
        bad = (ids < 0) | (ids >= size)
        if ids.device.type != "cpu":
            torch.ops.aten._assert_async.msg(~bad.any(), f"{need}: an id is not in [0, {size}), the range of {field}")
        elif bad.any():
            raise ConfigError(need, int(ids[bad][0]), f"is not in [0, {size})", f"correct it, or raise {field}")
    return ids
