"""Loading and saving models for commands, with errors that say what is wrong with the folder."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.data import load_tokenizer
from moesaic.errors import CheckpointError
from moesaic.files import atomic_directory
from moesaic.train import CheckpointStore, load_model
from moesaic.train.loop import CHECKPOINTS


def model_folder(path: Path) -> Path:
    """`path` if it holds a model, or the last checkpoint if it is the output folder of a run.

    Raises:
        CheckpointError: if it is neither.
    """
    if (path / "config.json").is_file():
        return path
    latest = CheckpointStore(path / CHECKPOINTS, keep=1).latest()
    if latest is None:
        problem = "has no config.json and no checkpoints" if path.is_dir() else "is not a folder"
        raise CheckpointError(f"model = {str(path)!r} {problem}; give the folder of a model or of a training run")
    return latest


def load(path: Path) -> tuple[PreTrainedModel, Path]:
    """The causal language model at `path`, in evaluation mode and its own dtype, and the folder it came from.

    Raises:
        CheckpointError: if there is no model, a file is missing or cut short, or weights do not fit the config.
    """
    folder = model_folder(path)
    return load_model(folder, dtype="auto").eval(), folder


def tokenizer_of(folder: Path, given: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer at `given`, or else the one saved beside the model.

    Raises:
        DataError: if there is none.
    """
    return load_tokenizer(str(given or folder))


def check_output(target: Path, overwrite: bool) -> None:
    """Check that a model may be written to `target`; commands ask before they work.

    Raises:
        CheckpointError: if `target` exists and may not be replaced.
    """
    if target.exists() and not overwrite:
        raise CheckpointError(f"output = {str(target)!r} exists; choose another folder or pass --overwrite")


def save(model: PreTrainedModel, source: Path, target: Path, *, max_shard_size: str) -> None:
    """Save a model, and the tokenizer of `source` if it has one, in place of `target`: as a whole or not at all."""
    with atomic_directory(target) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if (source / "tokenizer_config.json").is_file():
            load_tokenizer(str(source)).save_pretrained(folder)
