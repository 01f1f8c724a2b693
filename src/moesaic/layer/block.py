"""The MoE block: tensor in, tensor out, in the place of a decoder layer's feed-forward network."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from moesaic.layer.capacity import drop_picks, limit_capacity
from moesaic.layer.depth import Passing
from moesaic.layer.dispatch import LOCAL, Dispatch
from moesaic.layer.experts import ActivationName, Experts
from moesaic.layer.load import LayerLoad
from moesaic.layer.override import overridden, served
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.routers import Router
from moesaic.layer.routers.base import fill_buffer
from moesaic.layer.routers.parts.inputs import linear
from moesaic.layer.schedule import value_at
from moesaic.layer.shared_experts import SharedExperts
from moesaic.layer.spec import MoESpec


class MoEBlock(nn.Module):
    """y = sum over picks of weight * expert(x) + shared(x).

    Children are named as in transformers, PEFT and vLLM: `gate` (the router), `experts`, `shared_experts`, and
    `shared_expert_gate` where the shared experts are scaled by a sigmoid. `depth_gate` decides which tokens pass the
    block where some may not. Shared experts placed "after" are not part of the sum: whoever owns the block calls `follow`
    on what the decoder layer makes of it, and `shared_norm` is their norm.

    Args:
        spec: what to build.
        hidden_size: D.
        layer: index of the decoder layer, under which the routing is recorded.
        experts: experts module to use instead of `Experts` (adapters and compressed experts come in here).
        norm: norm of shared experts placed "after"; an RMSNorm of epsilon 1e-6 if None.

    Attributes:
        dispatch: how tokens reach experts; expert parallelism sets it.
    """

    dispatch: Dispatch = LOCAL
    adaptive_coefficients: Tensor | None

    def __init__(
        self,
        spec: MoESpec,
        hidden_size: int,
        layer: int = 0,
        experts: nn.Module | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.gate: Router = spec.router.build(hidden_size, spec.experts.num_experts)
        self.gate.layer = layer
        self.capacity = spec.capacity
        self.depth = spec.depth
        self.depth_gate = nn.Linear(hidden_size, 1, bias=False) if spec.depth is not None else None
        self.experts = experts if experts is not None else Experts(spec.experts, hidden_size)
        if isinstance(self.experts, Experts):
            self.experts.may_skip = spec.may_skip
        self.shared_experts = self.shared_expert_gate = self.shared_norm = None
        if spec.shared_experts is not None:
            self.shared_experts = SharedExperts(
                hidden_size,
                spec.shared_width,
                activation=cast(ActivationName, spec.experts.activation),
                gated=spec.experts.gated,
                bias=spec.experts.bias,
            )
            if spec.shared_experts.sigmoid_gate:
                self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False)
            if spec.shared_experts.placement == "after":
                self.shared_norm = nn.RMSNorm(hidden_size, eps=1e-6) if norm is None else norm
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else None
        self.selection_bias_update = spec.selection_bias_update
        self.adaptive_losses = tuple(loss for loss in spec.balance if loss.adaptive is not None)
        coefficients = torch.empty(len(self.adaptive_losses), dtype=torch.float32) if self.adaptive_losses else None
        self.register_buffer("adaptive_coefficients", coefficients)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the block's own state; its children have their own."""
        if self.adaptive_coefficients is not None:
            first = [value_at(loss.coefficient, 0.0) for loss in self.adaptive_losses]
            fill_buffer(self.adaptive_coefficients, torch.tensor(first))

    def coefficients_by_loss(self) -> dict[str, Tensor]:
        """Coefficients that follow this layer's load, by the name of the loss, float32 scalars."""
        if self.adaptive_coefficients is None:
            return {}
        return dict(zip((loss.name for loss in self.adaptive_losses), self.adaptive_coefficients.clone(), strict=True))

    @property
    def moves_by_step(self) -> bool:
        """Whether `post_step` changes anything: a selection bias, coefficients or the router's own state."""
        own_state = type(self.gate).post_step is not Router.post_step
        return own_state or self.selection_bias_update is not None or bool(self.adaptive_losses)

    def post_step(self, load: LayerLoad, progress: float) -> None:
        """Commit state that changes once an optimiser step; see `moesaic.layer.post_step`."""
        self.gate.post_step(load, progress)
        if self.selection_bias_update is not None:
            bias = cast(Tensor, self.gate.e_score_correction_bias)
            self.selection_bias_update.apply(bias, load.chosen_M[: bias.numel()], progress)
        if self.adaptive_coefficients is not None:
            for index, loss in enumerate(self.adaptive_losses):
                assert loss.adaptive is not None
                self.adaptive_coefficients[index] = loss.adaptive.next(self.adaptive_coefficients[index], load)

    def _apply(self, fn: Any, recurse: bool = True) -> MoEBlock:
        """Casts leave the adaptive coefficients in float32."""
        before = self.adaptive_coefficients
        super()._apply(fn, recurse)
        after = self.adaptive_coefficients
        if before is not None and after is not None and after.dtype != before.dtype:
            self.adaptive_coefficients = before.to(after.device)
        return self

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        """Apply the block to (..., D); the routing is committed to `context` if there is one."""
        x_TD = x.reshape(-1, x.shape[-1])
        passing = self._passing(x_TD, context)
        inside = context if passing is None else passing.inside(context)
        routing = self._route(x_TD, inside)
        if passing is not None:
            routing = passing.record(routing, context)
        if context is not None:
            context.commit(self.layer, routing)
        if routing.assignment is not None:
            shared_TD = self._shared(x_TD, passing)
            y_TD = routing.assignment.run(self._run_experts, x_TD)
        else:
            picks = self._servable(routing, context)
            travel = self.dispatch.send(x_TD, *picks, slots=self._slots(routing, inside))
            shared_TD = self._shared(x_TD, passing)
            y_TD = travel.combine(self.experts(*travel.arrive()))
        if routing.identity_weight_T is not None:
            y_TD = y_TD + (routing.identity_weight_T.unsqueeze(-1) * x_TD).to(y_TD.dtype)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        if passing is not None:
            y_TD = passing.scaled(y_TD)
        if self.dropout is not None:
            y_TD = self.dropout(y_TD)
        if context is not None:
            y_TD = context.attach_state(y_TD, self.layer, routing.state)
            # A layer whose first run had a graph has its share in the total already.
            second_run = self.layer in context.ran_without_graph and torch.is_grad_enabled()
            if context.objective is not None and second_run and routing.logits_TN.requires_grad:
                y_TD = context.objective.attach(y_TD, self.layer, routing, context)
        return y_TD.view(x.shape)

    def follow(self, hidden: Tensor) -> Tensor:
        """hidden + shared(norm(hidden)) for shared experts placed "after", on the output (..., D) of the decoder layer."""
        assert self.shared_experts is not None
        assert self.shared_norm is not None
        y = self.shared_experts(self.shared_norm(hidden))
        return hidden + (y if self.dropout is None else self.dropout(y))

    def _route(self, x_TD: Tensor, context: RoutingContext | None) -> Routing:
        """What the router decides, what an override makes of it, and what a capacity leaves of that."""
        routing = self.gate(x_TD, context)
        if context is not None and context.override is not None:
            routing = overridden(self.layer, self.gate, routing, context)  # pyright: ignore[reportCallIssue] torch types its decorator loosely
            if routing.dropped_TK is not None:
                renormalize = self.capacity is not None and self.capacity.renormalize
                return drop_picks(routing, routing.dropped_TK, renormalize=renormalize)
        if self.capacity is not None:
            routing = limit_capacity(routing, self.capacity, context, training=self.training, layer=self.layer)
        return routing

    def _servable(self, routing: Routing, context: RoutingContext | None) -> tuple[Tensor, Tensor]:
        """Picks and weights as the experts can take them.

        An override may make picks of no expert where the router never does, and then kernels were chosen that can't skip
        them. These compute some expert instead, with weight 0.
        """
        if context is None or context.override is None or getattr(self.experts, "may_skip", False):
            return routing.index_TK, routing.weight_TK
        none_TK = routing.index_TK >= routing.num_experts
        return served(routing.index_TK, routing.num_experts), routing.weight_TK.masked_fill(none_TK, 0.0)

    def _passing(self, x_TD: Tensor, context: RoutingContext | None) -> Passing | None:
        if self.depth is None or self.depth_gate is None:
            return None
        logits_T = linear(x_TD, self.depth_gate.weight).squeeze(-1)
        return self.depth.choose(logits_T, context, training=self.training)

    def _slots(self, routing: Routing, context: RoutingContext | None) -> int | None:
        """The most tokens that an expert gets; None where nothing limits that, or where tokens stay here."""
        if self.capacity is None or self.dispatch is LOCAL:
            return None
        if context is not None and context.override is not None:
            return None  # it may leave the capacity out
        batch = 1 if context is None else context.batch_size
        length = routing.index_TK.shape[0] // batch
        return self.capacity.most(batch, length, routing.num_experts, routing.top_k, self.training)

    def _run_experts(
        self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, *, merge_GN: Tensor | None = None
    ) -> Tensor:
        """The experts' call, wherever they are; merged experts are made and run here."""
        if merge_GN is not None:
            return self.experts(x_TD, index_TK, weight_TK, merge_GN=merge_GN)
        travel = self.dispatch.send(x_TD, index_TK, weight_TK)
        return travel.combine(self.experts(*travel.arrive()))

    def _shared(self, x_TD: Tensor, passing: Passing | None) -> Tensor | None:
        """Outputs of the shared experts, 0 for tokens that don't pass the block; None if there are none in parallel."""
        if self.shared_experts is None or self.shared_norm is not None:
            return None
        # How many pass is not known to a compiler; it computes all, and the others' outputs are cleared later.
        if passing is not None and not torch.compiler.is_compiling():
            row_S = passing.passes_T.nonzero().squeeze(-1)
            rows_SD = self._shared(x_TD.index_select(0, row_S), None)
            assert rows_SD is not None
            return rows_SD.new_zeros(x_TD.shape).index_copy(0, row_S, rows_SD)
        shared_TD = self.shared_experts(x_TD)
        if self.shared_expert_gate is not None:
            shared_TD = torch.sigmoid(self.shared_expert_gate(x_TD)) * shared_TD
        return shared_TD
