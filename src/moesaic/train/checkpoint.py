"""Checkpoints of a run: an HF model folder that also holds what exact resuming needs.

step-00000100/
  config.json, model.safetensors, tokenizer.json, ...   the model, as `from_pretrained` loads it
  run.yaml                                              the resolved run
  trainer_state.pt                                      step, optimiser, data position, random number generators
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.configuration import read_yaml
from moesaic.errors import CheckpointError, ConfigError
from moesaic.files import atomic_directory
from moesaic.train.quiet import without_progress_bars
from moesaic.train.run import RunConfig

RUN_FILE = "run.yaml"
STATE_FILE = "trainer_state.pt"
_FORMAT = 1

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
        "train.log_every",
        "train.tensorboard",
    }
)


class CheckpointStore:
    """The checkpoints of one run, of which the latest few are kept.

    Args:
        folder: where they are; made with the first one.
        keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else []
        return sorted(path for path in found if re.fullmatch(r"step-\d{8}", path.name))

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        return (self.all() or [None])[-1]

    def save(
        self,
        step: int,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        run: RunConfig,
        state: dict[str, Any],
        weights: dict[str, Any] | None = None,
    ) -> Path:
        """Write the checkpoint of `step`, then remove those that are no longer kept.

        Args:
            step: optimiser steps made.
            model: saved with `save_pretrained`.
            tokenizer: saved beside it.
            run: the resolved run.
            weights: whole tensors to save in place of the model's own, which are spread over processes.
            state: of what `torch.load(weights_only=True)` accepts.

        Raises:
            CheckpointError: if it can't be written; earlier checkpoints are then intact.
        """
        path = self.folder / f"step-{step:08d}"
        previous = self.latest()
        try:
            with atomic_directory(path) as temporary, without_progress_bars():
                model.save_pretrained(temporary, state_dict=weights)
                tokenizer.save_pretrained(temporary)
                (temporary / RUN_FILE).write_text(run.to_yaml(), encoding="utf-8")
                _write_state({"format": _FORMAT, "step": step, **state}, temporary / STATE_FILE)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            left = f"the last checkpoint, {previous}, is intact" if previous else "there is no earlier checkpoint"
            raise CheckpointError(
                f"cannot write the checkpoint {path}: {reason}; {left}. Free some space, then resume the run"
            ) from error
        self._prune()
        return path

    def _prune(self) -> None:
        for path in self.all()[: -self.keep]:
            shutil.rmtree(path, ignore_errors=True)
        # Left behind where a process was killed while it wrote.
        for path in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


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


def _write_state(state: dict[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:
        # torch's own file writer says no more than this when the disk is full.
        raise OSError(f"torch.save failed ({error})") from error
