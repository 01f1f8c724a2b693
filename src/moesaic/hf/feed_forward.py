"""Reading the feed-forward networks of stock decoder layers: which layout they have, and their weights as ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class FeedForwardWeights:
    """Weights of one dense feed-forward network, (out, in) like `F.linear`.

    Attributes:
        up_HD: gate rows over up rows (2F, D) if gated, else (F, D).
        down_DF: second projection.
        gated: whether `up_HD` holds a gate.
        up_bias_H: bias of the first projection, or None.
        down_bias_D: bias of the second projection, or None.
    """

    up_HD: Tensor
    down_DF: Tensor
    gated: bool
    up_bias_H: Tensor | None
    down_bias_D: Tensor | None

    @property
    def intermediate_size(self) -> int:
        """F."""
        return self.down_DF.shape[1]


# Children of a feed-forward module, first projection(s) then second; a layout is recognised by its names.
GATED = ("gate_proj", "up_proj", "down_proj")
FUSED_GATED = ("gate_up_proj", "down_proj")
PLAIN = (("c_fc", "c_proj"), ("fc1", "fc2"), ("dense_h_to_4h", "dense_4h_to_h"), ("up_proj", "down_proj"))


def read(module: nn.Module) -> FeedForwardWeights | None:
    """The weights of a dense feed-forward module, or None if its layout is not known."""
    linears = {name for name, child in module.named_children() if isinstance(child, nn.Linear | Conv1D)}
    if linears == set(GATED):
        gate, up, down = (_linear(module, name) for name in GATED)
        bias = None if gate[1] is None or up[1] is None else torch.cat([gate[1], up[1]])
        return FeedForwardWeights(torch.cat([gate[0], up[0]]), down[0], True, bias, down[1])
    if linears == set(FUSED_GATED):
        up, down = (_linear(module, name) for name in FUSED_GATED)
        return FeedForwardWeights(up[0], down[0], True, up[1], down[1])
    for names in PLAIN:
        if linears == set(names):
            up, down = (_linear(module, name) for name in names)
            return FeedForwardWeights(up[0], down[0], False, up[1], down[1])
    return None


def _linear(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    child = getattr(module, name)
    weight = child.weight.t().contiguous() if isinstance(child, Conv1D) else child.weight
    return weight.detach(), None if child.bias is None else child.bias.detach()
