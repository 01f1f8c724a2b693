"""Adding balance losses to a language-model loss, with gradients that are right under every kind of checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moesaic.layer.balance.base import BalanceLoss
from moesaic.layer.record import Routing, RoutingContext
from moesaic.layer.schedule import value_at

Coefficient = Callable[[BalanceLoss, int], float | Tensor]


class BalanceObjective:
    """The balance losses of one forward pass: coefficient times loss, summed over layers, averaged over sequences.

    Args:
        losses: which losses.
        weight_B: share of each sequence in the mean; with the shares of all micro-batches of an optimiser step adding
            up to 1, their losses add up to the loss of one large batch.
        coefficient: of a loss in a layer; by default what the loss says for the beginning of the training.
    """

    def __init__(self, losses: Sequence[BalanceLoss], weight_B: Tensor, coefficient: Coefficient | None = None) -> None:
        self.losses = losses
        self.weight_B = weight_B
        self.coefficient = coefficient or _first_coefficient
        self.upstream: Tensor | None = None

    def by_name(self, context: RoutingContext) -> dict[str, Tensor]:
        """Each loss by its name, coefficient included."""
        zero = self.weight_B.new_zeros(())
        return {
            loss.name: sum(
                (self._of_layer(loss, layer, routing, context) for layer, routing in context.records.items()),
                start=zero,
            )
            for loss in self.losses
        }

    def add_to(self, language_loss: Tensor, aux_losses: dict[str, Tensor], context: RoutingContext) -> Tensor:
        """`language_loss` plus all `aux_losses`, differentiable through both.

        Reentrant checkpointing runs layers without a graph first, so their records carry no gradient. Their share is
        then added at recomputation, by `attach`, scaled with the gradient that reaches the total here.
        """
        total = language_loss + sum(aux_losses.values(), start=language_loss.new_zeros(()))
        if context.ran_without_graph and total.requires_grad and self.losses:
            context.objective = self
            total = _RememberUpstream.apply(total, self)
        return total

    def attach(self, y: Tensor, layer: int, routing: Routing, context: RoutingContext) -> Tensor:
        """`y` unchanged, whose backward also sends the balance gradient of `layer` into its router."""
        losses = [self._of_layer(loss, layer, routing, context) for loss in self.losses]
        return _AttachGradient.apply(y, torch.stack(losses).sum(), self)

    def _of_layer(self, loss: BalanceLoss, layer: int, routing: Routing, context: RoutingContext) -> Tensor:
        value = (loss.of_sequences(routing, context) * self.weight_B).sum()
        coefficient = self.coefficient(loss, layer)
        return (coefficient.to(value) if isinstance(coefficient, Tensor) else coefficient) * value


def _first_coefficient(loss: BalanceLoss, layer: int) -> float:
    return value_at(loss.coefficient, 0.0)


class _RememberUpstream(torch.autograd.Function):
    """Identity that keeps the gradient that reaches it; it runs before any layer's backward."""

    @staticmethod
    def forward(ctx, total: Tensor, objective: BalanceObjective) -> Tensor:
        ctx.objective = objective
        return total.view_as(total)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.objective.upstream = grad
        return grad, None


class _AttachGradient(torch.autograd.Function):
    """Identity on `y` that gives `loss` the gradient remembered by the objective."""

    @staticmethod
    def forward(ctx, y: Tensor, loss: Tensor, objective: BalanceObjective) -> Tensor:
        ctx.objective = objective
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, ctx.objective.upstream, None
