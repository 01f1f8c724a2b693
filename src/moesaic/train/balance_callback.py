"""HF Trainer's way to a balancer: steps, progress and statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from moesaic.train.stock_balance import Balancer


class BalanceCallback(TrainerCallback):
    """A balancer's steps and statistics under HF Trainer.

    Statistics go to `trainer.state.log_history` and to callbacks that stand after this one.
    """

    def __init__(self, balancer: Balancer) -> None:
        self._balancer = balancer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._balancer.set_training_progress(state.global_step / state.max_steps)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Trainer counts the step after this event.
        self._balancer.step((state.global_step + 1) / state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        statistics = self._balancer.statistics()
        logs.update(statistics)
        # Trainer has copied the logs into its history before callbacks see them.
        state.log_history[-1].update(statistics)
