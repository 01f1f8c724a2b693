"""Loading and saving models for commands, with errors that say what is wrong with the folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moesaic.cli.console import emit_json, results
from moesaic.data import TrainBPE, load_tokenizer
from moesaic.data.tokenizer import vocabulary_limit
from moesaic.errors import CheckpointError, ConfigError, DataError
from moesaic.files import atomic_directory
from moesaic.hf import build, read_backbone
from moesaic.trace import account
from moesaic.train import CheckpointStore, RunConfig, load_model
from moesaic.train.loop import CHECKPOINTS

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def _shard_size(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", text, re.IGNORECASE):
        raise typer.BadParameter(f"{text!r} is not a size; write it as 500MB or 5GB")
    return text


ShardSize = Annotated[str, typer.Option(callback=_shard_size, help="Largest size of one file, as 500MB or 5GB.")]


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


def run_on_meta(run: RunConfig) -> PreTrainedModel:
    """The model of a run, MoE or dense, without its weights: shapes are enough to count.

    Only the model of `initial_model` is on the CPU with its weights.
    """
    if run.initial_model is not None:
        return load(Path(run.initial_model))[0]
    backbone = run.backbone
    assert backbone is not None, "RunConfig checks this"
    if isinstance(backbone, dict) and "vocab_size" not in backbone:
        wanted = run.data.tokenizer
        size = wanted.vocab_size if isinstance(wanted, TrainBPE) else len(load_tokenizer(wanted.path))
        backbone = {**backbone, "vocab_size": size}
    config = read_backbone(backbone)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config) if run.moe is None else build(config, run.moe)


def tokenizer_of(folder: Path, model: PreTrainedModel, given: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer at `given`, or else the one saved beside the model in `folder`.

    Raises:
        ConfigError: if `given` is not a folder.
        DataError: if there is no tokenizer.
        CheckpointError: if it has tokens that the model has no embedding for.
    """
    if given is not None and not given.is_dir():
        raise ConfigError("--tokenizer", str(given), "is not a folder", "give the folder of a saved tokenizer")
    source = given or folder
    if not any((source / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError(f"there is no tokenizer in {source}; give the folder of one with --tokenizer")
    tokenizer = load_tokenizer(source)
    known = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if vocabulary_limit(tokenizer) > known:
        raise CheckpointError(
            f"the tokenizer in {source} has {vocabulary_limit(tokenizer)} tokens and the model only {known}; "
            f"give the model's own with --tokenizer"
        )
    return tokenizer


def positions_of(model: PreTrainedModel) -> int | None:
    """How many positions a sequence may have; None if its config names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_output(target: Path, overwrite: bool) -> None:
    """Check that a model may be written to `target`; commands ask before they work.

    Raises:
        CheckpointError: if `target` exists and may not be replaced.
    """
    if target.exists() and not overwrite:
        raise CheckpointError(f"output = {str(target)!r} exists; choose another folder or pass --overwrite")


def save(model: PreTrainedModel, source: Path, target: Path, *, max_shard_size: str) -> None:
    """Save a model, and the tokenizer of `source` if it has one, in place of `target`: as a whole or not at all.

    Raises:
        CheckpointError: if it can't be written; `target` is then as it was.
    """
    try:
        with atomic_directory(target) as folder:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            if any((source / name).is_file() for name in _TOKENIZER_FILES):
                load_tokenizer(source).save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot write the model {target}: {reason}; nothing was left there. Free some space, or write elsewhere"
        ) from error


def announce(model: PreTrainedModel, output: Path, *, json: bool) -> None:
    """Print what a model that was just written is made of, and what to do next."""
    accounting = account(model)
    if json:
        emit_json({"output": str(output), **accounting.to_dict()})
        return
    results.print(accounting)
    results.print(f"Wrote {output}. Next: moesaic inspect {output}")
