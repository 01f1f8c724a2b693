"""What a router decided, and what it may look at: the two objects that pass between router, experts and losses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.layer.assignment import Assignment

if TYPE_CHECKING:
    from moesaic.layer.override import RoutingOverride


@dataclass(frozen=True)
class Routing:
    """The record of one MoE layer for one forward pass.

    An index equal to `num_experts` means *no expert* (transformers' sentinel): kernels skip such picks and they add
    nothing to the output. A router scores M columns: its N experts, then its null experts, which compute nothing.

    Attributes:
        index_TK: picked experts, int64, each in [0, N]; the order of the K picks carries no meaning.
        weight_TK: weight of each pick at combine, in the router's precision.
        logits_TN: raw router outputs of all M columns, attached to the autograd graph.
        scores_TN: the score function over *all* columns, before selection bias and group masks; balance losses read it.
        selection_TN: what the selection compared, biased and masked; carries no gradient.
        state: what this layer's router hands to the next MoE layer, if its kind does so.
        num_null: null experts among the columns, which are the last ones.
        chosen_TK: what was selected, in [0, M], before null experts and dropped picks became no expert; None where that
            is `index_TK`. Balance losses count these.
        dropped_TK: picks that found their expert full; None without a capacity.
        identity_weight_T: weight with which the token itself is added to the output, from nulls that pass it on.
        skipped_T: real tokens that did not pass the layer at all, if some may not (mixture of depths).
        overridden: an override has made other picks or weights than the router.
        ragged: tokens have different numbers of picks; K is that of the widest token, and means nothing else.
        assignment: how experts get their input when it is not a token for each pick: slots, or merged experts.
        load_TN: differentiable probability of each column to be selected, where the router has one (noisy top-k); the
            load loss balances its sum over tokens.
        basis_TN: what the weights of picks are taken from, attached to the graph, where that is neither the logits nor the
            scores: logits with noise, for one.
        auxiliary: losses that belong to the router's mechanism, by name, a value for each token (T,).
        statistics: what the router's `post_step` reads besides counts, by name: sums over the pass, without gradient,
            which are added over passes and ranks. A router gives the same names in every pass of a training.
    """

    index_TK: Tensor
    weight_TK: Tensor
    logits_TN: Tensor
    scores_TN: Tensor
    selection_TN: Tensor
    state: Tensor | None = None
    num_null: int = 0
    chosen_TK: Tensor | None = None
    dropped_TK: Tensor | None = None
    identity_weight_T: Tensor | None = None
    skipped_T: Tensor | None = None
    ragged: bool = False
    overridden: bool = False
    assignment: Assignment | None = None
    load_TN: Tensor | None = None
    basis_TN: Tensor | None = None
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_columns(self) -> int:
        """M, the number of columns that the router scores: experts and null experts."""
        return self.logits_TN.shape[-1]

    @property
    def num_experts(self) -> int:
        """N, the number of experts that compute something."""
        return self.num_columns - self.num_null

    @property
    def top_k(self) -> int:
        """K, the number of picks for each token."""
        return self.index_TK.shape[-1]

    def context_inside(self, context: RoutingContext) -> RoutingContext:
        """The context in which tokens that skipped the layer are padding, which balance losses leave out."""
        if self.skipped_T is None:
            return context
        passes_T = ~self.skipped_T
        return replace(context, mask_T=passes_T if context.mask_T is None else context.mask_T & passes_T)

    @property
    def choice_TK(self) -> Tensor:
        """What was selected, in [0, M]; M where nothing was."""
        if self.chosen_TK is not None:
            return self.chosen_TK
        if not self.num_null:
            return self.index_TK
        return self.index_TK.masked_fill(self.index_TK == self.num_experts, self.num_columns)


class Recomputed(Protocol):
    """What adds a layer's balance gradient while the layer is recomputed; see `BalanceObjective`."""

    def attach(self, y: Tensor, layer: int, routing: Routing, context: RoutingContext) -> Tensor:
        """`y` unchanged, whose backward also reaches the router of `layer`."""
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
        modality_T: modality of each token, if the model was told.
        task_B: task of each sequence, if the model was told.
        group: processes whose sequences, together with these, are the batch of balance losses with scope "batch"; None for
            those of this process alone. All of the group must then run the same layers and losses.
        seed: int64 scalar from which routers that draw random numbers derive them; None for a fixed one. It makes them
            pure functions: layers that are recomputed draw the same numbers.
        override: what changes the routing of layers in this pass; None to leave it to their routers.
        records: routing by layer index, in the order in which layers ran.
        ran_without_graph: layers that first ran without recording a graph, as reentrant checkpointing has them.
        objective: set when layers must add their balance gradient while they are recomputed.
        state_gradients: gradient of each layer's router state that recomputed layers above have left for it.
    """

    batch_size: int = 1
    token_ids_T: Tensor | None = None
    position_T: Tensor | None = None
    mask_T: Tensor | None = None
    modality_T: Tensor | None = None
    task_B: Tensor | None = None
    group: dist.ProcessGroup | None = None
    seed: Tensor | None = None
    override: RoutingOverride | None = None
    records: dict[int, Routing] = field(default_factory=dict)
    ran_without_graph: set[int] = field(default_factory=set)
    objective: Recomputed | None = None
    state_gradients: dict[int, Tensor] = field(default_factory=dict)

    def commit(self, layer: int, routing: Routing) -> None:
        """Keep the routing of `layer`. The first one stands: recomputation under checkpointing must not replace it."""
        if layer not in self.records:
            self.records[layer] = routing
            if not torch.is_grad_enabled():
                self.ran_without_graph.add(layer)

    def previous(self, layer: int) -> int | None:
        """Index of the last MoE layer below `layer` that has run, or None."""
        below = [index for index in self.records if index < layer]
        return max(below) if below else None

    def previous_state(self, layer: int) -> Tensor | None:
        """The router state of the last MoE layer below `layer`, or None.

        Differentiable also under reentrant checkpointing, of all layers or some. A layer then first runs without a graph
        and again, with one, within the backward pass. A state from a first run has no graph to go back through, and a
        second run must not go back through the graph of a layer that runs once, whose backward would then run twice.
        So the gradient is left in `state_gradients` for the lower layer's own backward, which comes later; see
        `attach_state`.
        """
        below = self.previous(layer)
        state = None if below is None else self.records[below].state
        if below is None or state is None or not torch.is_grad_enabled():
            return state
        second_run = layer in self.ran_without_graph
        if state.requires_grad and not second_run:
            return state
        return _LeaveGradient.apply(state.detach().requires_grad_(), self, below)

    def attach_state(self, y: Tensor, layer: int, state: Tensor | None) -> Tensor:
        """`y` unchanged, whose backward also sends into `state` the gradient that layers above left for it by then."""
        if state is None or not state.requires_grad:
            return y
        return _TakeGradient.apply(y, state, self, layer)

    def tokens_per_sequence(self, num_tokens: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Number of real tokens of each sequence, shape (B,)."""
        if self.mask_T is None:
            return torch.full((self.batch_size,), num_tokens // self.batch_size, dtype=dtype, device=device)
        return self.mask_T.view(self.batch_size, -1).sum(-1).to(dtype)


class _LeaveGradient(torch.autograd.Function):
    """Identity on a router state that keeps its gradient for the layer that made it."""

    @staticmethod
    def forward(ctx, state: Tensor, context: RoutingContext, layer: int) -> Tensor:
        ctx.context, ctx.layer = context, layer
        return state.view_as(state)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        gradients = ctx.context.state_gradients
        gradients[ctx.layer] = gradients[ctx.layer] + grad if ctx.layer in gradients else grad
        return grad, None, None


class _TakeGradient(torch.autograd.Function):
    """Identity on `y` that gives `state` the gradient that recomputed layers above have left for it, if any."""

    @staticmethod
    def forward(ctx, y: Tensor, state: Tensor, context: RoutingContext, layer: int) -> Tensor:
        ctx.context, ctx.layer = context, layer
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        return grad, ctx.context.state_gradients.pop(ctx.layer, None), None, None
