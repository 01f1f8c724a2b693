"""The training loop: steps with accumulation, evaluation, checkpoints, and a clean stop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.data import Batch, PreparedData, prepare_data
from moesaic.dist.process import LostPeer, Meeting, Process, naming_lost_peers, process_group, share_cores
from moesaic.errors import DataError, TrainingError
from moesaic.files import write_text
from moesaic.hf import MoesaicForCausalLM
from moesaic.layer import post_step
from moesaic.train.alerts import describe_alerts
from moesaic.train.checkpoint import RUN_FILE, CheckpointStore, check_same_run, load_optimizer_state, load_state
from moesaic.train.evaluate import Evaluation, evaluate
from moesaic.train.metrics import MetricsFile, MetricsSink, StepMetrics, TensorBoardSink, evaluation_record
from moesaic.train.model import check_architecture, objective_of, select_device
from moesaic.train.objective import Objective, language_model_objective, model_inputs, predicted_tokens
from moesaic.train.optimizer import build_optimizer, set_learning_rate
from moesaic.train.progress import NoProgress, ProgressDisplay, describe_evaluation, progress_display
from moesaic.train.ranks import OneProcess, Ranks, check_parallel
from moesaic.train.rng import seed_step
from moesaic.train.routing_load import RoutingLoad, load_metrics
from moesaic.train.routing_monitor import RoutingMonitor
from moesaic.train.run import RunConfig
from moesaic.train.signals import StopSignals
from moesaic.train.start import start_model
from moesaic.train.tracing import StepTrace, rewind_trace, tracing

METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
_REPEAT_SECONDS = 5.0  # in which a second signal to one of several processes is taken for the first


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: optimiser steps made over the whole run.
        finished: whether that is all of them.
        tokens: tokens trained on over the whole run.
        validation: last evaluation by domain; empty if there was none yet.
        checkpoint: the last checkpoint: a folder that `AutoModelForCausalLM.from_pretrained` loads.
        metrics_file: JSON lines, as `read_metrics` reads them.
        seconds: wall time of this call's training, data preparation not included.
        tokens_per_second: over that time; 0 if there was nothing left to do.
        signal: number of the signal that stopped the run, or None.
    """

    step: int
    finished: bool
    tokens: int
    validation: dict[str, Evaluation]
    checkpoint: Path
    metrics_file: Path
    seconds: float
    tokens_per_second: float
    signal: int | None

    @property
    def exit_code(self) -> int:
        """For a process: 0, or 128 + signal by the convention of shells."""
        return 0 if self.signal is None else 128 + self.signal


def train(
    run: RunConfig,
    output_dir: str | Path,
    *,
    resume: bool | Literal["auto"] = False,
    data: PreparedData | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train the model of `run`, or go on training it.

    Where a launcher (`torchrun`) has started several processes that all call this, they train one model together, as
    `run.parallel` says; only the first reports and writes metrics. SIGINT or SIGTERM, of any of them, ends it after the
    current step, with a checkpoint; a second one ends it at once.

    Args:
        run: what to train.
        output_dir: where `run.yaml`, `metrics.jsonl`, `checkpoints/` and `tensorboard/` go.
        resume: go on from the last checkpoint in `output_dir`. False refuses a folder that has one, True one that has
            none, "auto" takes either. On one machine the losses equal those of an uninterrupted run.
        data: what `prepare_data(run.data, ...)` returned, to share it between runs; None to do that here.
        cache_dir: where tokenised text is cached; None for `data/` in `output_dir`.
        progress: show progress on stderr.

    Raises:
        ConfigError: if a field is invalid, also one of `run.parallel` for the number of processes.
        DataError: if the data can't be read.
        CheckpointError: if a checkpoint can't be written, is damaged, or belongs to another run.
        TrainingError: if a loss or gradient is not finite, `output_dir` does not fit `resume`, or another process is lost.
    """
    output_dir = Path(output_dir)
    store = CheckpointStore(
        output_dir / CHECKPOINTS,
        run.train.keep_checkpoints,
        always=run.train.checkpoint_steps,
        in_background=run.train.async_checkpoint,
    )
    process = Process.of_environment()
    checkpoint = _checkpoint_to_resume(store, resume)
    if checkpoint is not None:
        check_same_run(checkpoint, run)
    device = process.device(select_device(run.train.device))
    layout = check_parallel(run, process)
    check_architecture(run)
    share_cores(process)
    with process_group(process, device):
        meeting = Meeting(process)
        _check_same_folder(meeting.of_first(checkpoint), checkpoint, process)
        if data is None:
            data = _prepare(run, Path(cache_dir or output_dir / "data"), process, meeting, progress)
        model, ranks = start_model(run, data.tokenizer, checkpoint, process, layout, device)
        trainer = Trainer(run, model, data, store, ranks)
        if checkpoint is not None:
            trainer.load_state_dict(load_state(checkpoint))
            load_optimizer_state(checkpoint, model, trainer.optimizer)
        if process.is_first:
            write_text(output_dir / RUN_FILE, run.to_yaml())
            rewind_trace(run.train.trace, output_dir, trainer.step)
        meeting.wait()
        meeting.limit_collectives(run.parallel.timeout_seconds)
        result = trainer.fit(output_dir, progress=progress)
        meeting.wait()  # a launcher ends the others when one ends with a signal's exit code
        return result


class Trainer:
    """A model in training: makes steps, and knows all that a checkpoint must hold.

    Args:
        run: the run; its `train` section drives this class.
        model: on its device, in training mode.
        data: where batches come from.
        store: where checkpoints go.
        ranks: the processes that train it together; None for this one alone.

    Attributes:
        step: optimiser steps made.
        tokens: tokens trained on.
        validation: last evaluation by domain.
    """

    def __init__(
        self,
        run: RunConfig,
        model: PreTrainedModel,
        data: PreparedData,
        store: CheckpointStore,
        ranks: Ranks | None = None,
    ) -> None:
        self.run, self.config, self.model, self.data, self.store = run, run.train, model, data, store
        self.ranks = ranks or OneProcess(model)
        self.optimizer = build_optimizer(model, run.train, model.device)
        process = self.ranks.process
        self.batches = data.train_batches(shard_index=process.rank, num_shards=process.world)
        self.objective = objective_of(run, data.tokenizer)
        self.routing = RoutingMonitor(run.train.routing_every, run.train.alerts)
        self.stop = StopSignals(_REPEAT_SECONDS if process.distributed else 0.0)
        self.step = self.tokens = 0
        self._saved_step: int | None = None
        self._trace = StepTrace(None)
        self.validation: dict[str, Evaluation] = {}

    def fit(self, output_dir: Path, *, progress: bool = True) -> TrainResult:
        """Train to the last step or to a signal, with a checkpoint at the end; see `train`."""
        started, first_tokens = time.perf_counter(), self.tokens
        with (
            self._reporting(output_dir, progress) as (sinks, display),
            self._tracing(output_dir),
            self.stop,
            self._lost_peers(),
        ):
            if self._saved_step != self.step and self.step in self.config.checkpoint_steps:
                self.save()
            while self.step < self.config.steps and self._stopped_by() is None:
                if (begins := self.objective.begins(self.step, self.config.steps)) is not None:
                    display.note(f"after step {self.step}: objective {begins}")
                metrics = self.train_step()
                _write(sinks, metrics.record())
                display.step(metrics)
                last = self.step == self.config.steps
                records, alerts = self.routing.report(self.step, last=last)
                for record in records:
                    _write(sinks, record)
                for line in describe_alerts(alerts):
                    display.note(line)
                # A stop must not wait for an evaluation; the end of the run has one in any case.
                if last or (_due(self.step, self.config.eval_every) and self._stopped_by() is None):
                    self.evaluate()
                    _write(sinks, evaluation_record(self.step, self.validation))
                    display.note(describe_evaluation(self.step, self.validation))
                wanted = self.step in self.config.checkpoint_steps
                if last or wanted or _due(self.step, self.config.checkpoint_every):
                    self.save()
            checkpoint = self._last_checkpoint()
            stopped_by = self._stopped_by()
            if stopped_by is not None:
                display.note(f"stopped by a signal after step {self.step}; resume from {checkpoint}")
        seconds = time.perf_counter() - started
        return TrainResult(
            step=self.step,
            finished=self.step >= self.config.steps,
            tokens=self.tokens,
            validation=self.validation,
            checkpoint=checkpoint,
            metrics_file=output_dir / METRICS_FILE,
            seconds=seconds,
            tokens_per_second=(self.tokens - first_tokens) / seconds,
            signal=stopped_by,
        )

    def train_step(self) -> StepMetrics:
        """One optimiser step over `accumulation_steps` batches.

        Raises:
            TrainingError: if a loss or the gradient is not finite; weights are then as before the step.
        """
        started = time.perf_counter()
        seed_step(self.config.seed, self.step, self.ranks.process.rank)
        batches = [self._next_batch(micro_batch) for micro_batch in range(self.config.accumulation_steps)]
        num_items = self.ranks.count(predicted_tokens(batches))
        if num_items == 0:
            raise DataError(f"the batch of step {self.step + 1} has no token to predict; use longer sequences")
        moe_model = self.model if isinstance(self.model, MoesaicForCausalLM) else None
        if moe_model is not None:
            moe_model.set_training_progress(self.step / self.config.steps)
        sums = _StepSums()
        for index, batch in enumerate(batches):
            with self._autocast(), self._trace.of(self.step + 1, batch):
                inputs = model_inputs(batch, self.model.device)
                objective = language_model_objective(self.model, inputs, num_items, self.config.output_z_loss)
            self.ranks.before_backward(last=index == len(batches) - 1)
            objective.loss.backward()
            sums.add(objective)
        gradient_norm = self.ranks.clip(self.config.gradient_clip)
        losses = [sums.cross_entropy, *sums.aux_losses.values()]
        reduced = self.ranks.reduce(losses, time.perf_counter() - started, self.stop.received)
        cross_entropy, aux_losses = reduced.values[0], dict(zip(sums.aux_losses, reduced.values[1:], strict=True))
        self._check_finite({"cross entropy": cross_entropy, **aux_losses, "gradient norm": gradient_norm})

        learning_rate = self.config.learning_rate * self.config.schedule.factor(self.step, self.config.steps)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        loads = sums.load.take()
        self.routing.add(loads)
        if moe_model is not None:
            post_step(moe_model.moe_blocks(), loads, self.step / self.config.steps)
        tokens = self.ranks.process.world * sum(batch["input_ids"].numel() for batch in batches)
        self.tokens += tokens
        return StepMetrics(
            step=self.step,
            tokens=self.tokens,
            loss=cross_entropy,
            aux_losses=aux_losses,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            tokens_per_second=tokens / (time.perf_counter() - started),
            **load_metrics(loads),
            ranks=self.ranks.metrics(reduced, loads),
        )

    def _next_batch(self, micro_batch: int) -> Batch:
        packed = next(self.batches)
        return self.objective.batch(
            packed,
            step=self.step,
            steps=self.config.steps,
            micro_batch=micro_batch,
            first_row=self.ranks.process.rank * len(packed["input_ids"]),
        )

    def evaluate(self) -> None:
        """Evaluate on the held-out text into `validation`."""
        batches, bf16 = self.data.validation_batches(), self.config.precision == "bf16"
        self.validation = evaluate(
            self.model, batches, max_batches=self.config.eval_batches, bf16=bf16, ranks=self.ranks
        )

    def save(self) -> Path:
        """Write a checkpoint of this step."""
        self._trace.finish_part()
        path = self.store.save(self.step, self.model, self.optimizer, self.data.tokenizer, self.run, self.state_dict())
        self._saved_step = self.step
        return path

    def state_dict(self) -> dict[str, Any]:
        """All but weights and optimiser: counters and data position. Random numbers follow from seed and step."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "validation": {domain: asdict(found) for domain, found in self.validation.items()},
            "data": self.batches.state_dict(),
            "routing": self.routing.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            DataError: if the data is not what it was.
        """
        self.step, self.tokens = state["step"], state["tokens"]
        self._saved_step = self.step
        self.validation = {domain: Evaluation(**found) for domain, found in state["validation"].items()}
        self.batches.load_state_dict(state["data"])
        if "routing" in state:  # not in checkpoints of earlier versions
            self.routing.load_state_dict(state["routing"], self.model.device)

    def _stopped_by(self) -> int | None:
        return self.ranks.agreed_signal(self.stop.received)

    @contextlib.contextmanager
    def _lost_peers(self) -> Iterator[None]:
        """Say of collectives that fail when it was; a signal that came too ends the process at once then."""
        limit = f"parallel.timeout_seconds = {self.run.parallel.timeout_seconds:g}"
        try:
            with naming_lost_peers(self.ranks.process, lambda: f"after step {self.step}", limit):
                yield
        except LostPeer:
            self.stop.act()
            raise

    @contextlib.contextmanager
    def _tracing(self, output_dir: Path) -> Iterator[None]:
        rank, domains = self.ranks.process.rank, self.data.summary.domains
        with tracing(self.config.trace, self.model, output_dir, rank, self.data.tokenizer, list(domains)) as trace:
            self._trace = trace
            yield

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _last_checkpoint(self) -> Path:
        """The checkpoint of this step, on disk."""
        if self._saved_step != self.step:
            self.save()
        self.store.wait()
        return self.store.path(self.step)

    def _check_finite(self, quantities: dict[str, float]) -> None:
        for name, value in quantities.items():
            if not math.isfinite(value):
                checkpoint = self.store.latest()
                kept = f"The last good checkpoint is {checkpoint}" if checkpoint else "There is no checkpoint yet"
                raise TrainingError(
                    f"step {self.step + 1}: the {name} is {value}. {kept}. Try a lower train.learning_rate "
                    f"({self.config.learning_rate} now), more warm-up, a smaller train.gradient_clip, or fp32"
                )

    @contextlib.contextmanager
    def _reporting(self, output_dir: Path, progress: bool) -> Iterator[tuple[list[MetricsSink], ProgressDisplay]]:
        """Metrics files and display, closed at the end."""
        with contextlib.ExitStack() as stack:
            sinks: list[MetricsSink] = []
            if not self.ranks.process.is_first:
                yield sinks, NoProgress()
                return
            if self.config.tensorboard:
                sinks.append(TensorBoardSink(output_dir / TENSORBOARD, self.step))
            sinks.append(MetricsFile(output_dir / METRICS_FILE, self.step))
            display: ProgressDisplay = NoProgress()
            if progress:
                display = progress_display(self.config.steps, self.step, self.config.log_every)
            for reporter in (*sinks, display):
                stack.callback(reporter.close)
            yield sinks, display


@dataclass
class _StepSums:
    """Losses and expert load of the micro-batches of one step; stays on the device until the step is over."""

    cross_entropy: Tensor | float = 0.0
    aux_losses: dict[str, Tensor] = field(default_factory=dict)
    load: RoutingLoad = field(default_factory=RoutingLoad)

    def add(self, objective: Objective) -> None:
        self.cross_entropy = self.cross_entropy + objective.cross_entropy
        for name, loss in objective.aux_losses.items():
            self.aux_losses[name] = self.aux_losses[name] + loss if name in self.aux_losses else loss
        if objective.routing is not None:
            self.load.add(objective.routing)


def _checkpoint_to_resume(store: CheckpointStore, resume: bool | Literal["auto"]) -> Path | None:
    latest = store.latest()
    if resume is True and latest is None:
        raise TrainingError(f"there is no checkpoint in {store.folder} to resume from; start the run without resume")
    if resume is False and latest is not None:
        raise TrainingError(f"{latest} belongs to an earlier run; resume it, or train into another folder")
    return latest


def _check_same_folder(of_first: Path | None, here: Path | None, process: Process) -> None:
    """Refuse to go on where processes see different checkpoints, as they do without a shared folder."""
    if of_first != here:
        raise TrainingError(
            f"rank {process.rank} finds {here or 'no checkpoint'} to go on from where rank 0 finds "
            f"{of_first or 'none'}; give all hosts the same output folder, on a file system that they share"
        )


def _prepare(run: RunConfig, cache_dir: Path, process: Process, meeting: Meeting, progress: bool) -> PreparedData:
    """Tokenised text: one process of each host makes it, which may take long, while the others wait."""
    data = prepare_data(run.data, cache_dir, progress=progress) if process.is_first_on_host else None
    meeting.wait()
    return data or prepare_data(run.data, cache_dir, progress=False)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _write(sinks: list[MetricsSink], record: dict[str, Any]) -> None:
    for sink in sinks:
        sink.write(record)
