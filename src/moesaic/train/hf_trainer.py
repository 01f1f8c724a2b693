"""HF Trainer: what changes once an optimiser step, and routing metrics in its logs.

Correct balance losses need nothing: Trainer passes `num_items_in_batch` to the model's forward, which makes each
micro-batch's losses, balance included, its share of the mean over the whole optimiser step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moesaic.errors import UnsupportedModel
from moesaic.hf import MoesaicForCausalLM, MoesaicModel
from moesaic.layer import BalanceLoss, RoutingContext, post_step
from moesaic.train.alerts import Alert, AlertMonitor, AlertsConfig, describe_alerts
from moesaic.train.routing_load import RoutingLoad, load_metrics, statistics_of

logger = logging.getLogger(__name__)


class RoutingMetricsCallback(TrainerCallback):
    """Adds the routing of the steps since the last log to HF Trainer's logs.

    Keys, with a layer number each: `max_violation/layer_3` (largest expert load over the mean load, minus 1, over all
    tokens since the last log), `entropy/layer_3` and `unused_share/layer_3` (see `LayerStatistics`), `drop_rate/layer_3` and
    `null_share/layer_3` where there are any, and, for every balance loss by name, `load_balancing/layer_3` (mean over
    micro-batches, coefficient not included). When a layer collapses by the thresholds of `alerts`, `alert/layer_3` is 1 once
    and a warning names layer, values and thresholds; when it has recovered it is 0 once. They go to `trainer.state.log_history` and to callbacks that stand after this one:
    for TensorBoard, `TrainingArguments(report_to="none")` and
    `callbacks=[RoutingMetricsCallback(), TensorBoardCallback()]`.

    Works for models that contain a `MoesaicModel`, also wrapped by PEFT.

    Args:
        alerts: thresholds beyond which a layer counts as collapsed, checked with each log; None for no alerts.

    Raises:
        UnsupportedModel: when training begins, if there is none in the model.
    """

    def __init__(self, alerts: AlertsConfig | None = AlertsConfig()) -> None:  # noqa: B008 (it is immutable)
        self._load = RoutingLoad()
        self._alerts = None if alerts is None else AlertMonitor(alerts)
        self._losses: Sequence[BalanceLoss] = ()
        self._sums: dict[str, Tensor] = {}
        self._forwards = 0
        self._handle: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        decoder = _find(MoesaicModel, kwargs["model"], type(self).__name__)
        self._losses = decoder.config.spec.balance

        def listen(context: RoutingContext) -> None:
            # Evaluation during training runs the same model.
            if decoder.training:
                self._add(context)

        self._handle = decoder.add_routing_listener(listen)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not self._forwards:
            return
        metrics, alerts = self._take(state.global_step)
        if state.is_world_process_zero:
            for line in describe_alerts(alerts):
                logger.warning("%s", line)
        logs.update(metrics)
        # Trainer has copied the logs into its history before callbacks see them.
        state.log_history[-1].update(metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._handle is not None:
            self._handle.remove()

    @torch.no_grad()
    def _add(self, context: RoutingContext) -> None:
        self._forwards += 1
        self._load.add(context)
        for layer, routing in context.records.items():
            for loss in self._losses:
                key = f"{loss.name}/layer_{layer}"
                value = loss.of_sequences(routing, context).mean()
                self._sums[key] = self._sums[key] + value if key in self._sums else value

    def _take(self, step: int) -> tuple[dict[str, float], list[Alert]]:
        loads = self._load.take()
        metrics = {
            f"{name}/layer_{layer}": value
            for name, values in load_metrics(loads).items()
            for layer, value in values.items()
        }
        statistics = statistics_of(loads)
        for layer, values in statistics.items():
            metrics[f"entropy/layer_{layer}"] = values.entropy
            metrics[f"unused_share/layer_{layer}"] = values.unused_share
        alerts = [] if self._alerts is None else self._alerts.check(step, statistics)
        metrics.update({f"alert/layer_{alert.layer}": float(alert.state == "started") for alert in alerts})
        metrics.update({key: float(total) / self._forwards for key, total in self._sums.items()})
        self._sums, self._forwards = {}, 0
        return metrics, alerts


class RoutingStepCallback(TrainerCallback):
    """Does after each optimiser step what `moesaic.train` does: moves selection biases, adaptive coefficients and other
    router state by the load of the step, and coefficients by their schedules.

    Needed for `selection_bias_update`, for coefficients that are a schedule or adaptive, and for routers with state of
    their own. Works for models that contain a `MoesaicForCausalLM`, also wrapped by PEFT. The load is summed over the
    processes of torch.distributed.

    Raises:
        UnsupportedModel: when training begins, if there is none in the model.
    """

    def __init__(self) -> None:
        self._load = RoutingLoad()
        self._handle: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        decoder = _find(MoesaicModel, kwargs["model"], type(self).__name__)

        def listen(context: RoutingContext) -> None:
            if decoder.training:
                self._load.add(context)

        self._handle = decoder.add_routing_listener(listen)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = _find(MoesaicForCausalLM, kwargs["model"], type(self).__name__)
        model.set_training_progress(state.global_step / state.max_steps)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        decoder = _find(MoesaicModel, kwargs["model"], type(self).__name__)
        # Trainer counts the step after this event.
        post_step(decoder.moe_blocks(), self._load.take(), (state.global_step + 1) / state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._handle is not None:
            self._handle.remove()


ModelT = TypeVar("ModelT", MoesaicModel, MoesaicForCausalLM)


def _find(kind: type[ModelT], model: nn.Module, callback: str) -> ModelT:
    for module in model.modules():
        if isinstance(module, kind):
            return module
    raise UnsupportedModel(
        f"{callback} needs a moesaic model, not {type(model).__name__}; convert the model, or leave it out"
    )
