"""The `train` section of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from moesaic.configuration import Config
from moesaic.errors import ConfigError
from moesaic.train.alerts import AlertsConfig
from moesaic.train.schedule import CosineSchedule, Schedule


class TraceConfig(Config):
    """What of the routing of the training steps goes to disk; docs/trace.md.

    Attributes:
        path: folder of the trace in the output folder. All processes write to it, and a run that is resumed goes on with it.
        sample: share of the documents, each as a whole.
        every_steps: trace one step in so many, and the first.
        scores: also keep the router's scores of all experts.
    """

    path: str = "routing.trace"
    sample: float = Field(default=0.1, gt=0, le=1)
    every_steps: PositiveInt = 1
    scores: bool = False

    @model_validator(mode="after")
    def _inside(self) -> TraceConfig:
        if not self.path or Path(self.path).is_absolute() or ".." in Path(self.path).parts:
            raise ConfigError("path", self.path, "is not a folder in the output folder", "give a relative path")
        return self


class TrainConfig(Config):
    """How long and with what to train.

    Attributes:
        steps: optimiser steps of the whole run.
        learning_rate: peak learning rate.
        schedule: how the learning rate moves.
        weight_decay: decoupled decay of matrices; norms, biases and other vectors are never decayed.
        betas: AdamW's averaging factors.
        epsilon: AdamW's epsilon.
        output_z_loss: coefficient of mean (log sum exp logits)^2 over predicted tokens, which keeps the output logits small
            (PaLM, arXiv 2204.02311, section 5; OpenMoE 1e-4); 0 for none.
        gradient_clip: largest gradient norm, over all parameters together; None not to clip.
        accumulation_steps: batches of `data.batch_size` in one optimiser step. The result is that of one batch as large
            as all of them.
        precision: "bf16" computes under bfloat16 autocast; weights, optimiser and routers stay float32.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        compile: compile the model's forward with `torch.compile`.
        device: "auto" takes the accelerator if there is one; or "cpu", "cuda", "cuda:1", "mps".
        seed: seed of the initial weights and of dropout.
        eval_every: evaluate after every this many steps, and after the last; None for only after the last.
        eval_batches: evaluate on at most this many batches of a domain; None for all.
        checkpoint_every: write a checkpoint after every this many steps, and after the last; None for only after the
            last.
        async_checkpoint: write checkpoints while training goes on. A step that saves then takes as long as a copy of
            weights and optimiser to the memory of the host, which must have room for both: each process copies the
            tensors that it writes.
        keep_checkpoints: how many of the latest checkpoints stay on disk.
        checkpoint_steps: also write a checkpoint after each of these steps, 0 for the untrained model, and keep it
            whatever `keep_checkpoints` says: for studies of how a model comes about.
        log_every: where the output is not a terminal, print a line after every this many steps. Metrics are written at
            every step all the same.
        routing_every: report load, entropy, unused experts, drops and nulls of each MoE layer after every this many steps, over
            the tokens since the last report; None for no reports and no alerts.
        alerts: thresholds beyond which a layer counts as collapsed, checked with each report; None for no alerts.
        tensorboard: also write metrics for TensorBoard, below `tensorboard/` in the output folder.
        trace: write the routing of training steps to disk; None for not.
    """

    steps: PositiveInt = 1000
    learning_rate: PositiveFloat = 1e-3
    schedule: Schedule = CosineSchedule()
    weight_decay: NonNegativeFloat = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: PositiveFloat = 1e-8
    output_z_loss: NonNegativeFloat = 0.0
    gradient_clip: PositiveFloat | None = 1.0
    accumulation_steps: PositiveInt = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    device: str = "auto"
    seed: NonNegativeInt = Field(default=0, lt=2**63)  # what torch takes
    eval_every: PositiveInt | None = 100
    eval_batches: PositiveInt | None = None
    checkpoint_every: PositiveInt | None = 100
    async_checkpoint: bool = False
    keep_checkpoints: PositiveInt = 2
    checkpoint_steps: tuple[NonNegativeInt, ...] = ()
    log_every: PositiveInt = 10
    routing_every: PositiveInt | None = 10
    alerts: AlertsConfig | None = AlertsConfig()
    tensorboard: bool = False
    trace: TraceConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        for index, beta in enumerate(self.betas):
            if not 0 <= beta < 1:
                raise ConfigError(f"betas.{index}", beta, "is not an averaging factor", "choose from 0 to below 1")
        try:
            self.schedule.warmup(self.steps)
        except ConfigError as error:
            raise ConfigError(f"schedule.{error.field}", error.value, error.problem, error.remedy) from None
        return self
