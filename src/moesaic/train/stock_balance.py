"""`balance`: correct balance losses, selection-bias updates and load statistics for stock MoE models of transformers."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.errors import ConfigError, TrainingError, UnsupportedModel
from moesaic.hf.compat import wrap_method
from moesaic.hf.forward import forward_context, sequence_weights
from moesaic.hf.stock_routing import OwnLoss, StockRouter, stock_routers
from moesaic.layer import BalanceLoss, MoESpec, Routing, RoutingContext, Schedule, SelectionBiasUpdate
from moesaic.layer.balance import BalanceObjective, Coefficients
from moesaic.layer.schedule import value_at
from moesaic.train.balance_callback import BalanceCallback
from moesaic.train.routing_load import RoutingLoad, load_metrics

if TYPE_CHECKING:
    from transformers import Trainer  # imports all that a training may need

logger = logging.getLogger(__name__)


def balance(
    model: nn.Module,
    losses: Sequence[BalanceLoss | Mapping[str, Any]] = (),
    *,
    selection_bias_update: SelectionBiasUpdate | Mapping[str, Any] | None = None,
) -> Balancer:
    """Balance the experts of a stock MoE model while it is trained, without changing its class.

    In training mode, `losses` are added to the model's `loss`: for each layer, on the picks that its router made,
    weighted like the cross entropy, with `num_items_in_batch` over the whole optimiser step, and right under gradient
    checkpointing of both kinds. The stock head's own pooled loss is switched off. Then choose one way to make steps:

    - HF Trainer: `callbacks=[balancer.callback]`, or `balancer.attach(trainer)`.
    - TRL: `balancer.attach(trainer)`, whatever the order; TRL's trainers take the loss from elsewhere.
    - a loop of one's own: `balancer.attach(optimizer, steps=...)`.

    Args:
        model: a stock `...ForCausalLM` of a family in docs/router-presets.md, also wrapped by PEFT.
        losses: as in the `balance` section of a `MoESpec`, objects or dicts.
        selection_bias_update: how the load of each step moves the routers' selection bias, for families that have one.

    Raises:
        UnsupportedModel: if a router can't be read, or the model is one of moesaic's own, which need no help.
        ConfigError: if a loss does not fit the model, there is no bias to update, or nothing to do.
        TrainingError: if the model has a balancer already.
    """
    return Balancer(_transformers_model(model), losses, selection_bias_update)


class Balancer:
    """What `balance` returns: owns the hooks, the load of the step, and the coefficients.

    Attributes:
        losses: the losses.
        aux_losses: the last forward's losses by name, coefficient included, detached.
        callback: for HF Trainer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        losses: Sequence[BalanceLoss | Mapping[str, Any]],
        selection_bias_update: SelectionBiasUpdate | Mapping[str, Any] | None,
    ) -> None:
        if getattr(model, "_moesaic_balancer", None) is not None:
            raise TrainingError(f"{type(model).__name__} has a balancer already; call its `remove()` first")
        if not losses and selection_bias_update is None:
            raise ConfigError("losses", [], "leaves nothing to do", "give losses or a selection_bias_update")
        self._model = model
        self._routers = stock_routers(model)
        spec = _specs(self._routers, losses, selection_bias_update)
        self.losses, self._update = spec.balance, spec.selection_bias_update
        # Low-precision biases would round updates away.
        self._biases = {layer: _bias(router) for layer, router in self._routers.items()} if self._update else {}
        self._adaptive = {
            layer: {
                loss.name: torch.tensor(value_at(loss.coefficient, 0.0))
                for loss in self.losses
                if loss.adaptive is not None
            }
            for layer in self._routers
        }
        self._coefficients = Coefficients(self.losses, self._adaptive.__getitem__)
        self._load = RoutingLoad()
        self._open: RoutingContext | None = None
        self._recomputing: dict[int, tuple[Routing, RoutingContext]] = {}
        self._pending: list[tuple[RoutingContext, set[int]]] = []
        self._forwards = self._losses_added = 0
        self._missed = False
        self._sums: dict[str, Tensor] = {}
        self._statistics: dict[str, float] = {}
        self.aux_losses: dict[str, Tensor] = {}
        self.callback = BalanceCallback(self)
        self._undo: list[Callable[[], None]] = []
        self._install()

    def attach(self, target: torch.optim.Optimizer | Trainer, *, steps: int | None = None) -> None:
        """Make a step after each step of an optimiser or of a trainer, until `remove()`.

        Args:
            target: the optimiser; or an HF Trainer or one of TRL's. A trainer also gets the losses added to what its
                `compute_loss` returns, which serves trainers that do not use the model's own loss.
            steps: optimiser steps of the whole training, for coefficients and rates with a schedule.

        Raises:
            ConfigError: if a schedule needs `steps`.
        """
        if not isinstance(target, torch.optim.Optimizer):
            self._attach_trainer(target)
            return
        if steps is None and (self._coefficients.scheduled or isinstance(getattr(self._update, "rate", 0), Schedule)):
            raise ConfigError("steps", None, "is needed by schedules", "pass the number of steps of the training")
        made = 0

        def after_step(*_: Any) -> None:
            nonlocal made
            made += 1
            self.step(made / steps if steps else 0.0)

        # accelerate wraps optimisers.
        handle = getattr(target, "optimizer", target).register_step_post_hook(after_step)
        self._undo.append(handle.remove)

    def set_training_progress(self, fraction: float) -> None:
        """Move coefficients with a schedule to this share of the training."""
        self._coefficients.set_progress(fraction)

    @torch.no_grad()
    def step(self, progress: float = 0.0) -> None:
        """What happens once an optimiser step: move biases and coefficients by the load since the last step.

        Args:
            progress: share of the training that is done.

        Raises:
            TrainingError: if the model was trained and the losses reached no loss, or its load was not counted.
        """
        if self._missed or (self.losses and self._forwards and not self._losses_added):
            raise TrainingError(
                "balance has not seen this step: the trainer computes its loss past the model's forward, or calls it "
                "without labels; call balancer.attach(trainer)"
            )
        loads = self._load.take()
        for layer, load in loads.items():
            if self._update is not None:
                self._update.apply(self._biases[layer], load.chosen_M, progress)
                bias = self._routers[layer].selection_bias
                assert bias is not None
                bias.copy_(self._biases[layer].view_as(bias))
            for loss in self.losses:
                if loss.adaptive is not None:
                    self._adaptive[layer][loss.name] = loss.adaptive.next(self._adaptive[layer][loss.name], load)
        self.set_training_progress(progress)
        self._statistics = {
            f"{name}/layer_{layer}": value
            for name, values in load_metrics(loads).items()
            for layer, value in values.items()
        }
        self._statistics |= {f"aux_loss/{name}": float(value) for name, value in self._sums.items()}
        self._sums, self._pending = {}, []
        self._forwards = self._losses_added = 0
        self._missed = False

    def statistics(self) -> dict[str, float]:
        """Of the last optimiser step, under the keys that HF Trainer logs.

        `max_violation/layer_3` (largest expert load over the mean load, minus 1), `null_share/layer_3` where there are
        null experts, and `aux_loss/load_balancing` for each loss by name: coefficient included, summed over layers and
        this process's micro-batches.
        """
        return dict(self._statistics)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs besides the model: adaptive coefficients, and biases in full precision."""
        return {"adaptive": self._adaptive, "biases": self._biases}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for layer, values in state["adaptive"].items():
            self._adaptive[layer].update(values)
        for layer, bias_M in state["biases"].items():
            self._biases[layer].copy_(bias_M)

    def remove(self) -> None:
        """Take all hooks out and restore the model, its own loss included. Biases stay where they have moved."""
        for undo in reversed(self._undo):
            undo()
        self._undo = []

    # --- The model's forward --------------------------------------------------------------------------------------

    def _install(self) -> None:
        own = OwnLoss(self._model)
        if own.coefficient and self.losses:
            logger.warning(
                "the balance loss of %s itself (router_aux_loss_coef = %g) is switched off; it is pooled over layers",
                type(self._model).__name__,
                own.coefficient,
            )
        if self.losses:
            own.off()
            self._undo.append(own.restore)
        self._own_loss = own
        for layer, router in self._routers.items():
            handles = router.listen(functools.partial(self._on_routing, layer), self._on_output)
            self._undo.extend(handle.remove for handle in handles)
        self._wrap_forward()
        object.__setattr__(self._model, "_moesaic_balancer", self)
        self._undo.append(functools.partial(object.__delattr__, self._model, "_moesaic_balancer"))

    def _wrap_forward(self) -> None:
        """Not by a module hook, because PEFT calls `forward` past those."""
        signature = inspect.signature(self._model.forward)

        def balanced(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self._model.training or not torch.is_grad_enabled() or self._open is not None:
                return forward(*args, **kwargs)
            arguments = signature.bind_partial(*args, **kwargs).arguments
            named = {**arguments, **arguments.pop("kwargs", {})}
            context = self._begin(named)
            try:
                output = forward(*args, **kwargs)
            finally:
                self._open = None
            self._count(context)
            # With this keyword TRL's trainers ask for log-probabilities, and leave the loss alone.
            if named.get("labels") is None or "fused_lm_head" in named:
                return output
            is_tuple = isinstance(output, tuple)
            loss = output[0] if is_tuple else output.loss
            num_items, shift_labels = named.get("num_items_in_batch"), named.get("shift_labels")
            total = self._total(loss, context, named["labels"], num_items, shift_labels)
            if is_tuple:
                return (total, *output[1:])
            output.loss = total
            return output

        self._undo.append(wrap_method(self._model, "forward", balanced))

    def _begin(self, named: Mapping[str, Any]) -> RoutingContext:
        if self.losses and self._own_loss.is_back():
            raise TrainingError(
                "the model's own balance loss has been switched on again, so that there would be two; set "
                "output_router_logits=False in its config, and router_aux_loss_coef=0 where a trainer has that argument"
            )
        context = forward_context(
            named.get("input_ids"), named.get("inputs_embeds"), named.get("position_ids"), named.get("attention_mask")
        )
        self._open = context
        return context

    def _count(self, context: RoutingContext) -> None:
        self._forwards += 1
        self._load.add(context)

    def _total(
        self,
        loss: Tensor,
        context: RoutingContext,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None,
        shift_labels: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """The loss with the balance losses of the forward that filled `context`."""
        if not self.losses:
            return loss
        weight_B = scale * sequence_weights(labels, context, loss.device, num_items_in_batch, shift_labels)
        objective = BalanceObjective(self.losses, weight_B, self._coefficients)
        aux_losses = objective.by_name(context)
        self._losses_added += 1
        self.aux_losses = {name: value.detach() for name, value in aux_losses.items()}
        for name, value in self.aux_losses.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        total = objective.add_to(loss, aux_losses, context)
        if context.objective is not None:
            self._pending.append((context, set(context.records)))
        return total

    # --- Routers --------------------------------------------------------------------------------------------------

    def _on_routing(self, layer: int, x_TD: Tensor, output: Any) -> None:
        router = self._routers[layer]
        if not router.gate.training:
            return
        # Also when nothing reads it: layers that are recomputed must make the same tensors as in the first run.
        routing = router.routing(x_TD, output)
        if self._open is not None:
            self._open.commit(layer, routing)
            return
        if not torch.is_grad_enabled():
            return
        for position, (context, layers) in enumerate(self._pending):
            alone = len(self._pending) == 1
            if layer in layers and (alone or torch.equal(context.records[layer].index_TK, routing.index_TK)):
                layers.remove(layer)
                self._recomputing[layer] = (routing, context)
                if not layers:
                    del self._pending[position]
                return
        if not self._forwards:
            self._missed = True

    def _on_output(self, layer: int, y: Tensor) -> Tensor:
        if layer not in self._recomputing:
            return y
        routing, context = self._recomputing.pop(layer)
        assert context.objective is not None
        return context.objective.attach(y, layer, routing, context)

    # --- Trainers -------------------------------------------------------------------------------------------------

    def _attach_trainer(self, trainer: Trainer) -> None:
        if getattr(trainer, "aux_loss_enabled", False) and self.losses:
            logger.warning("the balance loss of %s itself is switched off", type(trainer).__name__)
            trainer.aux_loss_enabled = False  # pyright: ignore[reportAttributeAccessIssue] TRL's
            self._own_loss.off()

        def balanced(
            compute_loss: Callable[..., Any],
            model: nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Any:
            labels = inputs.get("labels")
            if not model.training or labels is None:
                return compute_loss(model, inputs, return_outputs, num_items_in_batch)
            context = self._begin(inputs)
            try:
                result: Any = compute_loss(model, inputs, return_outputs, num_items_in_batch)
            finally:
                self._open = None
            self._count(context)
            loss, *rest = result if return_outputs else (result,)
            scale = 1.0
            if num_items_in_batch is not None and trainer.args.average_tokens_across_devices:
                # As Trainer does with the loss of the model: averaging gradients over ranks divides by it again.
                scale = trainer.accelerator.num_processes // trainer.get_tp_size()
            total = self._total(loss, context, labels, num_items_in_batch, inputs.get("shift_labels"), scale)
            return (total, *rest) if return_outputs else total

        self._undo.append(wrap_method(trainer, "compute_loss", balanced))
        trainer.add_callback(self.callback)
        self._undo.append(functools.partial(trainer.remove_callback, self.callback))


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UnsupportedModel(f"{type(model).__name__} holds no transformers model")


def _specs(
    routers: Mapping[int, StockRouter],
    losses: Sequence[BalanceLoss | Mapping[str, Any]],
    update: SelectionBiasUpdate | Mapping[str, Any] | None,
) -> MoESpec:
    """The losses and the update, checked against each router."""
    if isinstance(losses, Mapping):
        raise ConfigError("losses", dict(losses), "is one loss, not a list of them", "put it in a list")
    entries = [loss.to_dict() if isinstance(loss, BalanceLoss) else dict(loss) for loss in losses]
    moves = update.to_dict() if isinstance(update, SelectionBiasUpdate) else update
    spec = None
    for router in routers.values():
        spec = MoESpec.from_dict(
            {
                "experts": {"num_experts": router.num_experts, "intermediate_size": 1},
                "router": router.rule.to_dict(),
                "balance": entries,
                "selection_bias_update": moves,
            }
        )
        if moves is not None and router.selection_bias is None:
            raise ConfigError(
                "selection_bias_update", moves, f"finds no bias in {router.preset.router}", "leave it out"
            )
    assert spec is not None
    for index, loss in enumerate(spec.balance):
        if loss.needs:
            problem = f"looks at the {min(loss.needs)} of tokens, which stock models are not told"
            raise ConfigError(f"balance.{index}.type", loss.type, problem, "leave it out, or convert the model")  # type: ignore[attr-defined]
    return spec


def _bias(router: StockRouter) -> Tensor:
    """A float32 copy of the selection bias, (M,)."""
    bias = router.selection_bias
    assert bias is not None
    return bias.detach().flatten().float().clone()
