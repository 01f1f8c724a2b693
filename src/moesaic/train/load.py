"""Loading a saved model, with damage found and named before any tensor is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moesaic.errors import CheckpointError
from moesaic.files import is_local
from moesaic.hf.weight_files import check_weight_files
from moesaic.train.quiet import without_progress_bars

# What a model is read from.
_FILES = ["*.json", "*.safetensors"]


def load_model(
    path: str | Path, *, dtype: torch.dtype | Literal["auto"] = torch.float32, device_map: str | None = None
) -> PreTrainedModel:
    """Load a causal language model: a moesaic checkpoint, or any other folder or hub name.

    Args:
        path: folder or hub name.
        dtype: dtype of the weights; "auto" keeps that of the checkpoint.
        device_map: where layers go, as transformers takes it (needs accelerate); None for the CPU.

    Raises:
        CheckpointError: if a file is missing or damaged, or tensors do not fit the config.
    """
    check_local_path(path)
    path = Path(path).expanduser() if is_local(path) else path
    if Path(path).is_dir():
        check_weight_files(path)
    try:
        with without_progress_bars():
            # Mismatches are refused below, with names; transformers' own error only points at its log.
            loaded = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, device_map=device_map, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights in {path} do not fit its config.json: tensors are missing or cannot be joined; "
            f"the folder mixes files of different models or lacks some"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load the model {path}: {str(error).strip().splitlines()[0]}") from error
    model, report = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            kind, found = problem.replace("_keys", ""), sorted(map(_described, report[problem]))
            raise CheckpointError(
                f"the weights in {path} do not fit its config.json: {len(found)} {kind} tensors, first {found[0]}; "
                f"the folder mixes files of different models or lacks some"
            )
    return model


def open_folder(path: str | Path) -> tuple[PreTrainedConfig, Path]:
    """The config of a saved model and the folder with its files, which are brought here if it is on the hub.

    Raises:
        CheckpointError: if there is no such model or its config can't be read.
    """
    check_local_path(path)
    try:
        local = is_local(path)
        folder = Path(path).expanduser() if local else Path(snapshot_download(str(path), allow_patterns=_FILES))
        return AutoConfig.from_pretrained(folder), folder
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load the model {path}: {str(error).strip().splitlines()[0]}") from error


def check_local_path(path: str | Path) -> None:
    """Check that what can only be a folder, not the name of a model on the hub, is one.

    Raises:
        CheckpointError: if there is no such folder.
    """
    if is_local(path) and not Path(path).expanduser().is_dir():
        raise CheckpointError(f"there is no model folder {path}; give the folder of a saved model or a hub name")


def _described(entry: Any) -> str:
    """An entry of transformers' loading report: a name, or a name with the shapes in the file and in the model."""
    if isinstance(entry, str):
        return entry
    name, in_file, in_model = entry
    return f"{name} with shape {tuple(in_file)} instead of {tuple(in_model)}"
