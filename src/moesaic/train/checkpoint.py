"""Checkpoints of a run: an HF model folder that also holds what exact resuming needs.

step-00000100/
  config.json, model*.safetensors, tokenizer.json, ...   the model, as `from_pretrained` loads it
  optimizer/                                             state of the optimiser, in torch's distributed format (DCP)
  run.yaml                                               the resolved run
  trainer_state.pt                                       step, tokens, data position, last evaluation

Nothing in it depends on how many processes wrote it, or which of them held what: any number of others can go on. They
also write it together, each its share.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.configuration import read_yaml
from moesaic.dist.checkpoint import Snapshot, Team, WriteFailed, load_optimizer
from moesaic.dist.checkpoint.snapshot import OPTIMIZER
from moesaic.errors import CheckpointError, ConfigError
from moesaic.train.run import RunConfig

RUN_FILE = "run.yaml"
STATE_FILE = "trainer_state.pt"
_FORMAT = 2

# Fields that may change when a run is resumed: they do not touch steps that were already made.
RESUMABLE_CHANGES = frozenset(
    {
        "parallel",
        "train.steps",
        "train.device",
        "train.eval_every",
        "train.eval_batches",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.checkpoint_steps",
        "train.async_checkpoint",
        "train.log_every",
        "train.routing_every",
        "train.alerts",
        "train.tensorboard",
        "train.trace",
    }
)


class CheckpointStore:
    """The checkpoints of one run, of which the latest few are kept.

    Where torch.distributed is started, all its processes save together, into a folder that all of them see.

    Args:
        folder: where they are; made with the first one.
        keep: how many to keep.
        always: steps whose checkpoints are kept in any case, and not counted.
        in_background: copy what is saved to the memory of the host, and write that while training goes on. One save is
            under way at most: the next one waits for it.
    """

    def __init__(self, folder: Path, keep: int, *, always: Collection[int] = (), in_background: bool = False) -> None:
        self.folder, self.keep, self._always, self._in_background = folder, keep, always, in_background
        self._team: Team | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._under_way: Future[None] | None = None

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else []
        return sorted(path for path in found if re.fullmatch(r"step-\d{8}", path.name))

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        return (self.all() or [None])[-1]

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is or will be."""
        return self.folder / f"step-{step:08d}"

    def save(
        self,
        step: int,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        tokenizer: PreTrainedTokenizerBase,
        run: RunConfig,
        state: dict[str, Any],
        weights: dict[str, Any] | None = None,
    ) -> Path:
        """Write the checkpoint of `step`, then remove those that are no longer kept.

        Args:
            step: optimiser steps made.
            model: saved as `save_pretrained` does.
            optimizer: over its parameters.
            tokenizer: saved beside it.
            run: the resolved run.
            state: of what `torch.load(weights_only=True)` accepts, and equal on all processes.

        Returns:
            Where it is, or in the background will be.

        Raises:
            CheckpointError: on all processes, if it, or the one before it in the background, can't be written; earlier
                checkpoints are then intact.
        """
        self.wait()
        path = self.path(step)
        self._team = team = self._team or Team()
        snapshot = Snapshot(model, optimizer, team, copy=self._in_background)
        scalars = _serialised({"format": _FORMAT, "step": step, **state})

        def write_rest(folder: Path) -> None:
            if team.rank == 0:
                tokenizer.save_pretrained(folder)
                (folder / RUN_FILE).write_text(run.to_yaml(), encoding="utf-8")
                (folder / STATE_FILE).write_bytes(scalars)

        def write() -> None:
            with team.directory(path) as temporary:
                snapshot.write(temporary)
                team.together(lambda: write_rest(temporary))
            if team.rank == 0:
                self._prune()

        if self._in_background:
            self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._under_way = self._writer.submit(self._guarded, write, path)
        else:
            self._guarded(write, path)
        return path

    def wait(self) -> None:
        """Wait for a save in the background; a collective call.

        Raises:
            CheckpointError: on all processes, if it could not be written.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _guarded(self, write: Callable[[], None], path: Path) -> None:
        previous = self.latest()
        try:
            write()
        except WriteFailed as error:
            left = f"the last checkpoint, {previous}, is intact" if previous else "there is no earlier checkpoint"
            raise CheckpointError(
                f"cannot write the checkpoint {path}: {error}; {left}. Free some space, then resume the run"
            ) from error

    def _prune(self) -> None:
        always = {self.path(step) for step in self._always}
        for path in [path for path in self.all() if path not in always][: -self.keep]:
            shutil.rmtree(path, ignore_errors=True)
        # Left behind where a process was killed while it wrote.
        for path in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def load_optimizer_state(checkpoint: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Fill an optimiser, spread over processes in whatever way, from a checkpoint.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    load_optimizer(checkpoint / OPTIMIZER, model, optimizer)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer state of a checkpoint, tensors on the CPU.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; only checkpoints written by training can be resumed")
    try:
        # weights_only: no code from the file is run.
        state = torch.load(path, map_location="cpu", weights_only=True)
        known = state["format"] == _FORMAT
    except Exception as error:  # torch raises errors of many kinds on damaged files.
        raise CheckpointError(
            f"{path} is damaged ({str(error).partition('. ')[0]:.200}); "
            f"remove the folder to resume from the checkpoint before it"
        ) from error
    if not known:
        raise CheckpointError(f"{path} has format {state['format']}, but this version of moesaic reads {_FORMAT}")
    return state


def check_same_run(checkpoint: Path, run: RunConfig) -> None:
    """Check that `checkpoint` was written by this run; fields in `RESUMABLE_CHANGES` may differ.

    Raises:
        CheckpointError: names the first field that differs.
    """
    path = checkpoint / RUN_FILE
    try:
        saved = RunConfig.from_dict(read_yaml(path))
    except ConfigError as error:
        raise CheckpointError(f"{path} can't be read ({error}); is {checkpoint} a checkpoint of a run?") from error
    difference = _first_difference(saved.to_dict(), run.to_dict())
    if difference is not None:
        field, before, now = difference
        raise CheckpointError(
            f"{checkpoint} belongs to another run: {field} is {before!r} there and {now!r} here; "
            f"restore the value to resume, or train into another folder"
        )


def _first_difference(saved: Any, current: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Path and both values where two plain structures first differ, or None."""
    if path in RESUMABLE_CHANGES or saved == current:
        return None
    if isinstance(saved, dict) and isinstance(current, dict):
        for name in [*saved, *(name for name in current if name not in saved)]:
            field = f"{path}.{name}" if path else name
            found = _first_difference(saved.get(name), current.get(name), field)
            if found is not None:
                return found
        return None
    return path, saved, current


def _serialised(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
