"""What a router decided, and what it may look at: the two objects that pass between router, experts and losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The record of one MoE layer for one forward pass.

    An index equal to `num_experts` means *no expert* (transformers' sentinel): kernels skip such picks and they add
    nothing to the output.

    Attributes:
        index_TK: picked experts, int64, each in [0, N]; the order of the K picks carries no meaning.
        weight_TK: weight of each pick at combine, in the router's precision.
        logits_TN: raw router outputs, attached to the autograd graph.
        scores_TN: the score function over *all* experts, before selection bias and group masks; balance losses read it.
        selection_TN: what the selection compared, biased and masked; carries no gradient.
        state: what this layer's router hands to the next MoE layer, if its kind does so.
    """

    index_TK: Tensor
    weight_TK: Tensor
    logits_TN: Tensor
    scores_TN: Tensor
    selection_TN: Tensor
    state: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """N, the number of experts that the router scores."""
        return self.logits_TN.shape[-1]

    @property
    def top_k(self) -> int:
        """K, the number of picks for each token."""
        return self.index_TK.shape[-1]


class Recomputed(Protocol):
    """What adds a layer's balance gradient while the layer is recomputed; see `BalanceObjective`."""

    def attach(self, y: Tensor, routing: Routing, context: RoutingContext) -> Tensor:
        """`y` unchanged, whose backward also reaches the router."""
        ...


@dataclass
class RoutingContext:
    """What belongs to one forward pass of a model: the tokens being routed and, layer by layer, their routing.

    One object is made for each forward pass and handed down to every MoE layer. T counts batch times sequence.

    Attributes:
        batch_size: number of sequences B; tokens of one sequence are contiguous in T.
        token_ids_T: token ids, if the model was called with ids.
        position_T: position of each token in its sequence, if known.
        mask_T: True for real tokens, False for padding; None when there is no padding.
        records: routing by layer index, in the order in which layers ran.
        objective: set when layers must add their balance gradient while they are recomputed.
    """

    batch_size: int = 1
    token_ids_T: Tensor | None = None
    position_T: Tensor | None = None
    mask_T: Tensor | None = None
    records: dict[int, Routing] = field(default_factory=dict)
    objective: Recomputed | None = None

    def commit(self, layer: int, routing: Routing) -> None:
        """Keep the routing of `layer`. The first one stands: recomputation under checkpointing must not replace it."""
        self.records.setdefault(layer, routing)

    def previous_state(self, layer: int) -> Tensor | None:
        """The router state of the last MoE layer below `layer`, or None."""
        below = [index for index in self.records if index < layer]
        return self.records[max(below)].state if below else None

    def tokens_per_sequence(self, num_tokens: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Number of real tokens of each sequence, shape (B,)."""
        if self.mask_T is None:
            return torch.full((self.batch_size,), num_tokens // self.batch_size, dtype=dtype, device=device)
        return self.mask_T.view(self.batch_size, -1).sum(-1).to(dtype)
