"""Loading a saved model, with damage found and named before any tensor is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesaic.errors import CheckpointError
from moesaic.files import is_local
from moesaic.train.quiet import without_progress_bars

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def load_model(path: str | Path, *, dtype: torch.dtype | Literal["auto"] = torch.float32) -> PreTrainedModel:
    """Load a causal language model: a moesaic checkpoint, or any other folder or hub name.

    Args:
        path: folder or hub name.
        dtype: dtype of the weights; "auto" keeps that of the checkpoint.

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
                path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
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


def check_weight_files(folder: str | Path) -> None:
    """Check that the safetensors files of a model folder are all there and as long as their headers say.

    Raises:
        CheckpointError: names the first file that is missing or damaged.
    """
    folder = Path(folder)
    for file in _weight_files(folder):
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; copy the checkpoint again or use another one")
        expected, actual = _safetensors_size(file), file.stat().st_size
        if expected != actual:
            raise CheckpointError(
                f"{file} is damaged: it has {actual} bytes where its header says {expected or 'nothing readable'}; "
                f"copy the checkpoint again or use another one"
            )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.is_file():
        return [folder / _SINGLE]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error}); copy the checkpoint again or use another one") from error
    return [folder / name for name in sorted(set(names))]


def _safetensors_size(file: Path) -> int | None:
    """Size of a whole safetensors file by its own header: 8 bytes of length, the header, the tensors."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= file.stat().st_size - 8:
            return None
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    return 8 + length + max(ends, default=0)
