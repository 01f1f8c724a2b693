"""HF Trainer: the routing of its training steps to disk."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moesaic.dist.process import Process
from moesaic.trace import StreamedTrace, record
from moesaic.train.config import TraceConfig
from moesaic.train.tracing import rewind_trace, trace_folder


class TraceCallback(TrainerCallback):
    """Writes the routing of HF Trainer's training steps to disk, of a moesaic model or a stock MoE model.

    Its evaluations are left out. Each process writes its own parts; before each checkpoint they are finished, and a
    training that is resumed drops what was traced after the checkpoint. The packing of documents is known from
    `position_ids`, where the data has them.

    Args:
        path: folder of the trace in the trainer's output folder.
        sample: share of the documents, each as a whole.
        every_steps: trace one step in so many, and the first.
        scores: also keep the router's scores of all experts.

    Raises:
        UnsupportedModel: when training begins, if the model's routing can't be recorded.
        TraceError: when training begins, if there is a trace of another model.
    """

    def __init__(
        self, path: str = "routing.trace", *, sample: float = 0.1, every_steps: int = 1, scores: bool = False
    ) -> None:
        self._config = TraceConfig(path=path, sample=sample, every_steps=every_steps, scores=scores)
        self._stack = contextlib.ExitStack()
        self._trace: StreamedTrace | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        output_dir = Path(args.output_dir or ".")
        process = Process.of_environment()
        if process.is_first:
            rewind_trace(self._config, output_dir, state.global_step)
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        tokenizer = kwargs.get("processing_class")
        self._trace = self._stack.enter_context(
            record(
                kwargs["model"],
                trace_folder(self._config, output_dir),
                sample=self._config.sample,
                scores=self._config.scores,
                tokenizer=tokenizer if hasattr(tokenizer, "get_vocab") else None,
                append=True,
                rank=process.rank,
            )
        )
        self._trace.active = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trace is not None:
            # Trainer counts a step when it is over.
            self._trace.step = state.global_step + 1
            self._trace.active = state.global_step % self._config.every_steps == 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._trace is not None:
            self._trace.active = False
            self._finish_part(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._finish_part(control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stack.close()
        self._trace = None

    def _finish_part(self, control: TrainerControl) -> None:
        """A checkpoint must not be ahead of its trace."""
        if self._trace is not None and control.should_save:
            self._trace.finish_part()
